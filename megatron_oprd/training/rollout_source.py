"""The rollouts of each step, generated in the step or during the step before."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.collect import collect, gather, share_of_engine
from megatron_oprd.rollout.engine import Rollout
from megatron_oprd.rollout.pool import EnginePool
from megatron_oprd.training import checkpoints
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.training.prompts import sent_prompts_of_step
from megatron_oprd.training.rollouts import sampling_of_step


@dataclass(frozen=True, kw_only=True)
class StepRollouts:
    """The rollouts of one step and the cost of getting them."""

    rollouts: list[Rollout]  # of the global batch, the same on every rank
    weight_sync_bytes: int  # sent to this rank's engine, see `EnginePool.sync`
    seconds_weight_sync: float  # wall-clock
    # Generation, or the wait for rollouts that were begun before, including a wait by an
    # evaluation.
    seconds_rollout: float


@dataclass(frozen=True, kw_only=True)
class _Ahead:
    """Rollouts that are in progress, or done."""

    step: int  # the step that they are for
    weights_version: int  # of the weights that generate them
    rollouts: list[Rollout] | None = None  # once they are done


class RolloutSource:
    """Gets a step's rollouts from the engines. Every rank has to make every call.

    With ``rollout.one_step_off_policy`` a step's rollouts are begun in the step before, as soon as
    the engines have that step's weights, so they are one update behind when they are trained on.
    The first step and the step after each checkpoint have rollouts of their own weights, so that a
    resumed run repeats the interrupted one.

    Args:
        plan: The run.
        context: This rank's place.
        engines: The run's engines.
        prompts: The run's prompts; on rank 0 only, which sends the others each step's.
    """

    def __init__(
        self,
        plan: RunPlan,
        context: ParallelContext,
        engines: EnginePool,
        prompts: Sequence[Prompt],
    ) -> None:
        self._plan = plan
        self._context = context
        self._engines = engines
        self._prompts = list(prompts)
        self._ahead: _Ahead | None = None
        self._seconds_waited = 0.0

    def of_step(self, step: int) -> StepRollouts:
        """The rollouts of a step; call it for each step in turn, when the student has its weights.

        Raises:
            RuntimeError: A rollout comes from the wrong weights; on every rank.
            RolloutEngineError: An engine failed too often; on every rank.
        """
        # The engines have to be idle before they get new weights.
        self.finish(weights_version=step)
        ahead, self._ahead = self._ahead, None
        waited, self._seconds_waited = self._seconds_waited, 0.0
        goes_ahead = self._goes_ahead(step)
        started, sent = time.perf_counter(), 0
        if ahead is None or goes_ahead:
            # Needed to generate now, and to generate ahead. Otherwise the engines stay as they are.
            sent = self._engines.sync(version=step)
        synced = time.perf_counter()
        if ahead is None:
            rollouts = collect(
                self._engines,
                self._prompts_of(step),
                sampling_of_step(step, self._plan.config),
                weights_version=step,
                context=self._context,
                reader=self._plan.teachers[0].reader,
            )
        else:
            assert ahead.step == step
            assert ahead.rollouts is not None
            rollouts = ahead.rollouts
        if goes_ahead:
            sampling = sampling_of_step(step + 1, self._plan.config)
            share = share_of_engine(self._engines, self._prompts_of(step + 1), sampling)
            self._engines.start(share, sampling)
            self._ahead = _Ahead(step=step + 1, weights_version=step)
        else:
            self._engines.sleep()
        return StepRollouts(
            rollouts=rollouts,
            weight_sync_bytes=sent,
            seconds_weight_sync=synced - started,
            seconds_rollout=waited + time.perf_counter() - synced,
        )

    def finish(self, *, weights_version: int) -> None:
        """Waits for rollouts in progress and keeps them, so that the engines can do something else.

        ``weights_version`` is that of the student's weights: an engine that fails here is restarted
        with these, and repeats its share of the rollouts. Raises the errors of `of_step`.
        """
        ahead = self._ahead
        if ahead is None or ahead.rollouts is not None:
            return
        started = time.perf_counter()
        generated = self._engines.finish(version=weights_version)
        rollouts = gather(
            self._engines,
            generated,
            self._prompts_of(ahead.step),
            sampling_of_step(ahead.step, self._plan.config),
            # The second is for shares that were repeated after a failure.
            weights_versions=(ahead.weights_version, weights_version),
            context=self._context,
            reader=self._plan.teachers[0].reader,
        )
        self._seconds_waited += time.perf_counter() - started
        self._ahead = _Ahead(
            step=ahead.step, weights_version=ahead.weights_version, rollouts=rollouts
        )

    def _prompts_of(self, step: int) -> list[Prompt]:
        return sent_prompts_of_step(step, self._prompts, self._plan.config, self._context)

    def _goes_ahead(self, step: int) -> bool:
        """Whether the next step's rollouts are begun in this one."""
        config = self._plan.config
        is_last = step + 1 == config.train_iters
        is_ahead = config.rollout.one_step_off_policy and not is_last
        # Not over a checkpoint: a resumed run could not repeat rollouts of older weights.
        return is_ahead and not checkpoints.is_due(step + 1, config)
