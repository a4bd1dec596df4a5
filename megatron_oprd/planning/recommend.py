"""The layouts of a run that fit, in the order of `ranking`.

Chosen are the sizes of tensor, pipeline, expert and (if nothing fits without it) context
parallelism, recompute, offload, and the settings that the rollout engine's kind names. All else is
as configured: what changes the results (the teacher's precision, ``rollout.max_staleness``), the
batch, targets' memory. `staleness` ranks what other staleness gains. Settings that the run itself
would refuse are refused here by its own checks (`check_values`, `Models.placed`,
`check_host_memory`).
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_oprd.config.checks import check_values
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.errors import UserError
from megatron_oprd.heartbeat import heartbeat
from megatron_oprd.planning.activations import Kernels
from megatron_oprd.planning.changes import Change, changed, unchecked
from megatron_oprd.planning.engine import engine_bytes
from megatron_oprd.planning.estimate import (
    MemoryEstimate,
    Models,
    check_host_memory,
    memory_of,
)
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.ranking import (
    Candidate,
    always_first,
    bound_of_others,
    counted,
    num_on,
    off_policy,
    ranked,
)
from megatron_oprd.planning.time import overlaps_training, rollout_seconds, step_seconds
from megatron_oprd.planning.workload import Workload, workload
from megatron_oprd.rollout.registry import engine_kind
from megatron_oprd.training.layout import RunLayout
from megatron_oprd.training.plan import alone

_LARGEST_PP = 16  # deeper pipelines of these models are mostly bubble
_SILENT_SECONDS = 5.0  # of a search, before it says how far it is

_RECOMPUTE = tuple(
    Change(
        (
            ("recompute.recompute_granularity", granularity),
            ("recompute.recompute_method", method),
            ("recompute.recompute_num_layers", number),
            ("recompute.distribute_saved_activations", False),
        )
    )
    for granularity, method, number in (
        (None, None, None),
        ("selective", None, None),
        ("full", "uniform", 1),
    )
)
_OFFLOAD = tuple(
    Change((("teacher.offload", teacher), ("optimizer.offload_states", states)))
    for teacher, states in itertools.product(("none", "cpu"), (False, True))
)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of a typical prompt and of a typical response, for the times."""

    prompt: int
    response: int


@dataclass(frozen=True, kw_only=True)
class _Trainer:
    """A layout with a choice of recompute, and the time of its passes and updates."""

    layouts: tuple[RunLayout, ...]  # of all teachers
    largest: Workload
    typical: Workload
    sizes: Change
    recompute: Change
    training: float  # seconds of all phases but rollouts, copies and weight sync
    bound: float  # of `Candidate.rank_seconds`, with the fastest of the engine's settings

    def least(self, rollout: float, *changes: Change) -> float:
        """A lower bound of `Candidate.rank_seconds`, with further changes and such rollouts."""
        hidden = 0.0
        if overlaps_training(self.layouts[0]):
            hidden = min(rollout, self.training)
        seconds = rollout + self.training - hidden
        return counted(seconds, hidden, num_on(self.recompute, *changes))


@dataclass(frozen=True, kw_only=True)
class _Engine:
    """Settings of the rollout engine."""

    change: Change
    seconds: float  # of a step's rollouts
    awake: int  # bytes on a GPU of the trainer


def recommend(
    config: RunConfig,
    models: Models,
    kernels: Kernels,
    hardware: Hardware,
    *,
    num_gpus: int,
    lengths: Lengths,
    number: int = 5,
) -> list[Candidate]:
    """The ``number`` first layouts that fit, in order; fewer if fewer fit.

    Layouts differ in their parallel sizes. Ranks share sequences only if nothing fits otherwise.
    """
    so_far = ""

    def first_with(cp: int) -> list[Candidate]:
        nonlocal so_far
        trainers: list[_Trainer] = []
        sizes = list(_sizes(config, models, hardware, num_gpus=num_gpus, cp=cp))
        for done, one in enumerate(sizes):
            so_far = f"{done} of {len(sizes)} layouts timed"
            trainers += _trainers(one, config, models, hardware, num_gpus=num_gpus, lengths=lengths)
        found: dict[Change, list[Candidate]] = {}  # by parallel sizes
        for done, trainer in enumerate(sorted(trainers, key=lambda one: one.bound)):
            so_far = f"memory of {done} settings, of {len(trainers)} at most"
            if not _tried(trainer, found, config, models, kernels, hardware, number):
                break
        return ranked(found, hardware, number)

    ahead = config.rollout.max_staleness
    work = f"ranking the layouts of {num_gpus} GPUs{f', {off_policy(ahead)}' if ahead else ''}"
    with heartbeat(work, lambda _: so_far, first_seconds=_SILENT_SECONDS):
        return next(filter(None, map(first_with, _divisors(num_gpus))), [])


def _tried(
    trainer: _Trainer,
    found: dict[Change, list[Candidate]],
    config: RunConfig,
    models: Models,
    kernels: Kernels,
    hardware: Hardware,
    number: int,
) -> bool:
    """Tries a trainer and notes what may come first of its sizes.

    Trainers come in the order of their bounds. False if neither this one nor a later one can be
    among the first ``number``.
    """
    bounds = sorted(
        min(bound_of_others(one, hardware) for one in group) for group in found.values()
    )
    if len(bounds) >= number and trainer.bound > bounds[number - 1]:
        return False
    known = found.get(trainer.sizes, [])
    if new := _fitting(trainer, config, models, kernels, hardware, known):
        found[trainer.sizes] = [*known, *new]
    return True


def _is_allowed(config: RunConfig, models: Models, hardware: Hardware, *, num_gpus: int) -> bool:
    """Whether a run takes the settings of teacher and engine that its layout was not made with."""
    try:
        check_values(config)
        models.placed(config, num_gpus=num_gpus)
        check_host_memory(
            config,
            num_ranks=num_gpus,
            ranks_on_host=min(hardware.gpus_per_node, num_gpus),
            available_bytes=round(hardware.host_memory_gb * 1e9),
        )
    except UserError:
        return False
    return True


def _fitting(
    trainer: _Trainer,
    config: RunConfig,
    models: Models,
    kernels: Kernels,
    hardware: Hardware,
    known: list[Candidate],
) -> list[Candidate]:
    """The choices of offload and engine with which the trainer fits and may come first of its size.

    ``known`` are candidates of the same sizes.
    """
    found: list[Candidate] = []
    limit = min((bound_of_others(one, hardware) for one in known), default=math.inf)
    engines = sorted(_engines(trainer, config, hardware), key=lambda one: one.seconds)
    smallest = min(engines, key=lambda one: one.awake)

    def settings(offload: Change, engine: _Engine) -> list[Change]:
        return [trainer.sizes, trainer.recompute, offload, engine.change]

    def memory_with(new: RunConfig) -> MemoryEstimate:
        layouts = _with(trainer, new)
        return memory_of(layouts, trainer.largest, kernels, memory_gb=hardware.memory_gb)

    for offload in _OFFLOAD:
        if trainer.least(engines[0].seconds, offload) > limit:
            continue
        # If the least engine is too much, all are.
        least = memory_with(unchecked(config, settings(offload, smallest)))
        if least.fullest.peak_bytes > hardware.memory_gb * 1e9:
            continue
        for engine in engines:
            if trainer.least(engine.seconds, offload) > limit:
                break
            changes = settings(offload, engine)
            new = unchecked(config, changes)
            memory = memory_with(new)
            if not memory.fits(hardware):
                continue
            change = Change(tuple(one for group in changes for one in group.settings))
            one = Candidate(
                change=change.new_in(config),
                memory=memory,
                seconds=step_seconds(memory.layouts, trainer.typical, hardware),
            )
            if one.rank_seconds > limit or any(
                always_first(better, one, hardware) for better in (*known, *found)
            ):
                continue
            if _is_allowed(new, models, hardware, num_gpus=trainer.layouts[0].world_size):
                found.append(one)
                limit = min(limit, bound_of_others(one, hardware))
    return found


def _with(trainer: _Trainer, config: RunConfig) -> tuple[RunLayout, ...]:
    """The trainer's layouts with other settings that place no layer elsewhere."""
    first, *others = trainer.layouts
    teachers = [
        replace(one, config=alone(config, extra))
        for one, extra in zip(others, config.extra_teachers, strict=True)
    ]
    return (replace(first, config=config), *teachers)


def _engines(trainer: _Trainer, config: RunConfig, hardware: Hardware) -> list[_Engine]:
    """The engine's alternatives, which need not be allowed."""
    kind = engine_kind(config.rollout)
    found = []
    # An engine's GPUs are of one node, and engines are on all GPUs.
    most = math.gcd(hardware.gpus_per_node, trainer.layouts[0].world_size)
    for settings in kind.alternatives(config.rollout, gpus_per_node=most):
        change = Change(settings)
        layout = _with(trainer, unchecked(config, [trainer.sizes, change]))[0]
        engine = engine_bytes(layout, trainer.largest, memory_gb=hardware.memory_gb)
        seconds = sum(rollout_seconds(layout, trainer.typical, hardware))
        awake = 0 if engine is None else engine.awake
        found.append(_Engine(change=change, seconds=seconds, awake=awake))
    return found


def _trainers(
    sizes: Change,
    config: RunConfig,
    models: Models,
    hardware: Hardware,
    *,
    num_gpus: int,
    lengths: Lengths,
) -> list[_Trainer]:
    """A trainer for each choice of recompute; none if the run would refuse the sizes."""
    try:
        # Without recompute, which places no layer elsewhere.
        plain = changed(config, [sizes, _RECOMPUTE[0]])
        layouts = models.placed(plain, num_gpus=num_gpus)
    except UserError:
        return []
    largest, typical = (
        workload(layouts[0], prompt_tokens=prompt, response_tokens=response, others=layouts[1:])
        for prompt, response in (
            (config.data.max_prompt_tokens, config.rollout.max_new_tokens),
            (lengths.prompt, lengths.response),
        )
    )
    trainer = _Trainer(
        layouts=tuple(layouts),
        largest=largest,
        typical=typical,
        sizes=sizes,
        recompute=_RECOMPUTE[0],
        training=0.0,
        bound=0.0,
    )
    fastest = min(one.seconds for one in _engines(trainer, config, hardware))
    found = []
    for recompute in _RECOMPUTE:
        new = _with(trainer, unchecked(config, [sizes, recompute]))
        step = step_seconds(new, typical, hardware)
        # Copies and sync depend on choices that are made later; without them it is a bound.
        one = replace(trainer, recompute=recompute, training=step.training - step.copies)
        found.append(replace(one, bound=one.least(fastest)))
    return found


def _sizes(
    config: RunConfig, models: Models, hardware: Hardware, *, num_gpus: int, cp: int
) -> Iterator[Change]:
    """Parallel sizes that divide the GPUs; tensor parallelism stays within a node."""
    experts = [a.moe.num_experts for a in (models.student, models.teacher) if a.moe is not None]
    for tp in _divisors(hardware.gpus_per_node):
        for pp in range(1, min(_LARGEST_PP, models.student.num_layers) + 1):
            if num_gpus % (tp * pp * cp):
                continue
            # Whole experts: shares of one would be small matrices.
            eps = [ep for ep in _divisors(num_gpus // pp) if not any(n % ep for n in experts)]
            for ep in eps if experts else [1]:
                yield Change(
                    (
                        ("parallel.tensor_model_parallel_size", tp),
                        ("parallel.sequence_parallel", tp > 1),
                        ("parallel.pipeline_model_parallel_size", pp),
                        ("parallel.virtual_pipeline_model_parallel_size", None),
                        ("parallel.num_layers_per_stage", None),
                        ("parallel.context_parallel_size", cp),
                        ("parallel.expert_model_parallel_size", ep),
                        ("parallel.expert_tensor_parallel_size", 1 if experts and tp > 1 else None),
                        ("teacher.expert_model_parallel_size", None),
                        ("teacher.expert_tensor_parallel_size", None),
                    )
                )


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
