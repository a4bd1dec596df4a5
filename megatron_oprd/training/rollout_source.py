"""The rollouts of each step: drawn in it, or ahead, while the step before is computed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.collect import collect, gather, share_of_replica
from megatron_oprd.rollout.engine import Rollout
from megatron_oprd.rollout.replicas import ReplicaEngines
from megatron_oprd.training import checkpoints
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.training.rollouts import prompts_of_step, sampling_of_step


@dataclass(frozen=True, kw_only=True)
class StepRollouts:
    """What one step is trained on.

    Attributes:
        rollouts: Those of the global batch, the same on every rank.
        weight_sync_bytes: What this rank's engine was sent, see `ReplicaEngines.sync`.
        seconds_weight_sync: Wall-clock of the weight sync.
        seconds_rollout: Wall-clock of generating, or of waiting for what was begun before, be it
            that an evaluation waited for it.
    """

    rollouts: list[Rollout]
    weight_sync_bytes: int
    seconds_weight_sync: float
    seconds_rollout: float


@dataclass(frozen=True, kw_only=True)
class _Ahead:
    """Rollouts that are under way, or done.

    Attributes:
        step: The step that they are for.
        weights_version: The version of the weights that the engines have.
        rollouts: They, once they are done.
    """

    step: int
    weights_version: int
    rollouts: list[Rollout] | None = None


class RolloutSource:
    """Asks the engines for a step's rollouts.

    With ``rollout.one_step_off_policy`` a step's rollouts are begun in the step before, as soon as
    the engines have that one's weights, and are one update behind when they are trained on. The
    first step has rollouts of its own weights, and so has the step after each checkpoint, so that a
    run that goes on from there is the run that was interrupted. Every rank has to make every call.

    Args:
        plan: The run.
        context: This rank's place.
        engines: The replicas' engines.
        prompts: The run's prompts; on leaders only.
    """

    def __init__(
        self,
        plan: RunPlan,
        context: ParallelContext,
        engines: ReplicaEngines,
        prompts: Sequence[Prompt],
    ) -> None:
        self._plan = plan
        self._context = context
        self._engines = engines
        self._prompts = list(prompts)
        self._ahead: _Ahead | None = None
        self._seconds_waited = 0.0

    def of_step(self, step: int) -> StepRollouts:
        """The rollouts of a step, whose weights the student has; called for each step in turn.

        Raises:
            RuntimeError: A rollout comes from other weights than it should; on every rank.
            RolloutEngineError: An engine failed too often; on every rank.
        """
        self.finish(weights_version=step)
        ahead, self._ahead = self._ahead, None
        waited, self._seconds_waited = self._seconds_waited, 0.0
        goes_ahead = self._goes_ahead(step)
        started, sent = time.perf_counter(), 0
        if ahead is None or goes_ahead:
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
            share = share_of_replica(self._prompts_of(step + 1), self._context)
            self._engines.start(share, sampling_of_step(step + 1, self._plan.config))
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
        """Waits for rollouts that are under way, so that the engines can do something else.

        They are kept for their step.

        Args:
            weights_version: The version of the student's weights. An engine that fails here gets
                these, and repeats its share of the rollouts with them.

        Raises:
            RuntimeError: See `of_step`.
            RolloutEngineError: See `of_step`.
        """
        ahead = self._ahead
        if ahead is None or ahead.rollouts is not None:
            return
        started = time.perf_counter()
        generated = self._engines.finish(version=weights_version)
        rollouts = gather(
            generated,
            self._prompts_of(ahead.step),
            sampling_of_step(ahead.step, self._plan.config),
            weights_versions=(ahead.weights_version, weights_version),
            context=self._context,
            reader=self._plan.teachers[0].reader,
        )
        self._seconds_waited += time.perf_counter() - started
        self._ahead = _Ahead(
            step=ahead.step, weights_version=ahead.weights_version, rollouts=rollouts
        )

    def _prompts_of(self, step: int) -> list[Prompt]:
        return prompts_of_step(step, self._prompts, self._plan.config)

    def _goes_ahead(self, step: int) -> bool:
        """Whether the next step's rollouts are begun in this one."""
        config = self._plan.config
        is_last = step + 1 == config.train_iters
        is_ahead = config.rollout.one_step_off_policy and not is_last
        return is_ahead and not checkpoints.is_due(step + 1, config)
