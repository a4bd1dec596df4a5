"""An engine's greedy responses after each weight sync, compared with those of transformers."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from megatron_oprd.config.load import load_config
from megatron_oprd.errors import UserError
from megatron_oprd.parallel.context import ParallelContext, parallel_run
from megatron_oprd.rollout.engine import Rollout
from megatron_oprd.rollout.registry import engine_kind
from megatron_oprd.selftest.cases import CaseFailedError, CaseSkippedError, Place
from megatron_oprd.selftest.steps import LINEAR_UPDATES
from megatron_oprd.training.plan import RunPlan, make_plan
from megatron_oprd.training.prompts import load_run_prompts
from megatron_oprd.training.rollout_source import RolloutSource
from megatron_oprd.training.rollouts import open_engines
from megatron_oprd.training.step import Distiller
from megatron_oprd.weights.export import Exporter

_STEPS = 3
# In bf16 a near tie flips a token, and then all that follow; with other weights nearly every first
# token is another one.
_FIRST_TOKENS_IN_BF16 = 0.75


def run(arguments: dict[str, Any], place: Place) -> str:
    """Runs a case: {overrides}. The student is updated between the syncs.

    Raises:
        CaseFailedError: Responses differ: in fp32 one token, in bf16 a quarter of the first tokens.
        CaseSkippedError: The engine is not installed.
    """
    file = place.models / "dense" / "run.yaml"
    overrides = [*LINEAR_UPDATES, "rollout.temperature=0", *arguments["overrides"]]
    config, of_reference = (
        load_config(file, [*overrides, *more]) for more in ([], ["rollout.engine=hf"])
    )
    try:
        engine_kind(config.rollout).check_installed(config.rollout)
    except UserError as reason:
        raise CaseSkippedError(str(reason)) from reason
    with parallel_run(config.parallel, seed=config.seed) as context:
        found = _steps(
            make_plan(config, world_size=1), make_plan(of_reference, world_size=1), context
        )
    for step, (ours, theirs) in enumerate(found):
        equal, first = _agreement(ours, theirs)
        if equal < 1 if config.model.params_dtype == "fp32" else first < _FIRST_TOKENS_IN_BF16:
            raise CaseFailedError(
                f"after the sync of step {step}, {equal:.0%} of the responses are transformers', "
                f"and {first:.0%} of their first tokens: the engine has other weights, or computes "
                "something else with them"
            )
    shares = ", ".join(f"{_agreement(*one)[0]:.0%}" for one in found)
    return f"responses equal to transformers' after {len(found)} syncs: {shares}"


def _steps(
    plan: RunPlan, reference: RunPlan, context: ParallelContext
) -> list[tuple[list[Rollout], list[Rollout]]]:
    """The rollouts of both engines in each step; the student learns from the first's."""
    distiller = Distiller(plan, context)
    exporter = Exporter(distiller.state.modules, plan.layout.student.table, context=context)
    prompts = load_run_prompts(plan)

    def stream(*, trainable_only: bool, wanted: bool) -> Iterator[tuple[str, Tensor | None]]:
        distiller.state.gather_parameters()
        return exporter.stream(trainable_only=trainable_only, wanted=wanted)

    found = []
    with (
        open_engines(plan, context, stream, log_prefix="") as engines,
        open_engines(reference, context, stream, log_prefix="") as others,
    ):
        ours = RolloutSource(plan, context, engines, prompts)
        theirs = RolloutSource(reference, context, others, prompts)
        for step in range(_STEPS):
            rollouts = ours.of_step(step).rollouts
            found.append((rollouts, theirs.of_step(step).rollouts))
            distiller.step(rollouts, step)
    return found


def _agreement(ours: Sequence[Rollout], theirs: Sequence[Rollout]) -> tuple[float, float]:
    """The shares of responses, and of their first tokens, that are equal."""
    pairs = list(zip(ours, theirs, strict=True))
    equal = sum(one.response_ids == other.response_ids for one, other in pairs)
    first = sum(one.response_ids[0] == other.response_ids[0] for one, other in pairs)
    return equal / len(pairs), first / len(pairs)
