"""The same run with the other policy: off-policy by one update, or on-policy.

Staleness changes what is trained, not only how fast (``rollout.max_staleness``). So layouts of the
other policy are never mixed with those of the settings; they are ranked by themselves.
"""

from dataclasses import dataclass, field, replace

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.errors import UserError
from megatron_oprd.planning.activations import Kernels
from megatron_oprd.planning.changes import Change, changed
from megatron_oprd.planning.estimate import Models
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.ranking import LEAST_GAIN, Candidate
from megatron_oprd.planning.recommend import Lengths, recommend
from megatron_oprd.rollout.registry import engine_kind


@dataclass(frozen=True, kw_only=True)
class OtherPolicy:
    """What a run gains or loses by another staleness of its rollouts."""

    change: Change  # rollout.max_staleness
    found: list[Candidate] = field(default_factory=list)  # its first layouts, if they pay
    refusal: str = ""  # why the other settings do not allow it; empty if they do


def other_policy(
    config: RunConfig,
    models: Models,
    kernels: Kernels,
    hardware: Hardware,
    found: list[Candidate],
    *,
    num_gpus: int,
    lengths: Lengths,
    number: int = 2,
) -> OtherPolicy | None:
    """Ranks the layouts of the other policy.

    ``found`` are those of the settings. Layouts that go off-policy have to gain as much as a
    setting that saves memory. None if staleness changes no time that is counted.
    """
    change = _other_staleness(config)
    if change is None:
        return None
    try:
        new = changed(config, [change])
    except UserError as error:
        return OtherPolicy(change=change, refusal=str(error))
    others = [
        replace(one, change=Change(change.settings + one.change.settings))
        for one in recommend(
            new, models, kernels, hardware, num_gpus=num_gpus, lengths=lengths, number=number
        )
    ]
    if found and new.rollout.max_staleness:
        least = found[0].rank_seconds
        others = [one for one in others if LEAST_GAIN * one.rank_seconds < least]
    return OtherPolicy(change=change, found=others)


def _other_staleness(config: RunConfig) -> Change | None:
    rollout = config.rollout
    kind = engine_kind(rollout)
    # A server's time is not counted. With oversample no engine generates ahead of a step.
    if not kind.overlaps or kind.place(rollout) == "server" or rollout.oversample:
        return None
    return Change((("rollout.max_staleness", 0 if rollout.max_staleness else 1),))
