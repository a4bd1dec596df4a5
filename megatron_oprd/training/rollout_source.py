"""The rollouts of each step, generated in the step or before it."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.collect import collect, gather, share_of_engine
from megatron_oprd.rollout.engine import Rollout
from megatron_oprd.rollout.pool import EnginePool, EngineWork
from megatron_oprd.rollout.registry import engine_kind
from megatron_oprd.training import checkpoints
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.training.prompts import sent_first_prompts, sent_prompts_of_step
from megatron_oprd.training.rollouts import (
    compares_logprobs,
    sampling_of_check,
    sampling_of_step,
)
from megatron_oprd.training.surplus import Surplus, SurplusUse


@dataclass(frozen=True, kw_only=True)
class StepRollouts:
    """The rollouts of one step and the cost of getting them."""

    rollouts: list[Rollout]  # of the global batch, the same on every rank
    weight_sync_bytes: int  # sent to this rank's engine, see `EnginePool.sync`
    seconds_weight_sync: float  # wall-clock
    # Generation, or the wait for rollouts that were begun before, including a wait by an
    # evaluation.
    seconds_rollout: float
    # Of each engine since the step before.
    work: tuple[EngineWork, ...]
    surplus: SurplusUse | None = None  # None: the step started what it used
    # Responses to the run's first prompts by the weights of this step, with log-probabilities.
    # Empty in a step that compares none, or that sent no weights.
    fixed: tuple[Rollout, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Ahead:
    """Rollouts of a later step that are in progress, or done."""

    step: int  # the step that they are for
    weights_version: int  # of the weights that they were begun with
    rollouts: list[Rollout] | None = None  # once they are done


class RolloutSource:
    """Gets a step's rollouts from the engines. Every rank has to make every call.

    With ``rollout.max_staleness`` = n rollouts are of weights at most n updates old:

    - An engine that overlaps (`EngineKind.overlaps`) begins a step's rollouts up to n steps before,
      as soon as it has that step's weights, and generates while steps are computed. If it swaps
      weights, it gets new ones in the middle of responses; otherwise n is 1.
    - Any other engine generates the rollouts of n + 1 steps at once.

    The first step and the step after each checkpoint have rollouts of their own weights, so that a
    resumed run repeats the interrupted one.

    With ``rollout.oversample`` no engine generates ahead of a step (`Surplus`).

    Args:
        plan: The run.
        context: This rank's place.
        engines: The run's engines.
        prompts: The run's prompts; on rank 0 only, which sends the others each step's.
        waiting: `Surplus.waiting` of the step that the run goes on after.
    """

    def __init__(
        self,
        plan: RunPlan,
        context: ParallelContext,
        engines: EnginePool,
        prompts: Sequence[Prompt],
        *,
        waiting: Sequence[int] = (),
    ) -> None:
        self._plan = plan
        self._context = context
        self._engines = engines
        self._prompts = list(prompts)
        self._surplus: Surplus | None = None
        if plan.config.rollout.oversample:
            self._surplus = Surplus(plan, context, engines, prompts, waiting=waiting)
        kind, rollout = engine_kind(plan.config.rollout), plan.config.rollout
        self._overlaps = kind.overlaps
        self._swaps = kind.swaps_weights(rollout) and rollout.steps_ahead > 1
        self._ahead: deque[_Ahead] = deque()
        self._seconds_waited = 0.0
        self._work: list[EngineWork] = []

    def of_step(self, step: int) -> StepRollouts:
        """The rollouts of a step; call it for each step in turn, when the student has its weights.

        Raises:
            RuntimeError: A rollout comes from the wrong weights; on every rank.
            RolloutEngineError: An engine failed too often; on every rank.
        """
        if self._surplus is not None:
            return self._with_surplus(self._surplus, step)
        if not self._swaps:
            # The engines have to be idle before they get new weights.
            self.finish(weights_version=step)
        waited, self._seconds_waited = self._seconds_waited, 0.0
        is_fresh = not self._ahead
        begun = self._steps_to_begin(step)
        started, sent = time.perf_counter(), 0
        if uses_weights := is_fresh or begun or (self._swaps and self._is_generating):
            # To generate now, or ahead, or in the middle. Otherwise the engines stay as they are.
            sent = self._engines.sync(version=step)
        synced = time.perf_counter()
        fixed = self._fixed(step) if uses_weights else ()
        now = [*([step] if is_fresh else []), *([] if self._overlaps else begun)]
        done = self._generate(now, weights_version=step)
        for later in begun:
            if self._overlaps:
                sampling = sampling_of_step(later, self._plan.config)
                share = share_of_engine(self._engines, self._prompts_of(later), sampling)
                self._engines.start(share, sampling)
            self._ahead.append(_Ahead(step=later, weights_version=step, rollouts=done.get(later)))
        rollouts = done.get(step)
        if rollouts is None:
            first = self._ahead.popleft()
            assert first.step == step
            rollouts = first.rollouts
            if rollouts is None:
                rollouts = self._wait(first, weights_version=step)
        work = self._take_work()
        if uses_weights and not self._is_generating:
            self._engines.sleep()
        return StepRollouts(
            rollouts=rollouts,
            weight_sync_bytes=sent,
            seconds_weight_sync=synced - started,
            seconds_rollout=waited + time.perf_counter() - synced,
            work=work,
            fixed=fixed,
        )

    def _with_surplus(self, surplus: Surplus, step: int) -> StepRollouts:
        started = time.perf_counter()
        sent = self._engines.sync(version=step)
        synced = time.perf_counter()
        fixed = self._fixed(step)
        rollouts, use = surplus.generate(step)
        work = self._take_work()
        seconds = time.perf_counter() - synced
        self._engines.sleep()
        return StepRollouts(
            rollouts=rollouts,
            weight_sync_bytes=sent,
            seconds_weight_sync=synced - started,
            seconds_rollout=seconds,
            work=work,
            surplus=use,
            fixed=fixed,
        )

    def _fixed(self, step: int) -> tuple[Rollout, ...]:
        """The engines' responses to the run's first prompts, right after a weight sync.

        Whatever the age of the step's rollouts, these are of the step's own weights.
        """
        config = self._plan.config
        if not compares_logprobs(step, config):
            return ()
        prompts = sent_first_prompts(self._prompts, config, self._context)
        sampling = sampling_of_check(config)
        self._note_work()
        found = collect(self._engines, prompts, sampling, weights_version=step)
        self._engines.take_work()  # the check's is not the step's
        return tuple(found)

    @property
    def waiting(self) -> tuple[int, ...]:
        """See `Surplus.waiting`; empty without ``rollout.oversample``."""
        return () if self._surplus is None else self._surplus.waiting

    @property
    def _is_generating(self) -> bool:
        return any(one.rollouts is None for one in self._ahead)

    def finish(self, *, weights_version: int) -> None:
        """Waits for rollouts in progress and keeps them, so that the engines can do something else.

        ``weights_version`` is that of the student's weights: an engine that fails here is restarted
        with these, and repeats its share of the rollouts. Raises the errors of `of_step`.
        """
        started = time.perf_counter()
        self._ahead = deque(
            one
            if one.rollouts is not None
            else replace(one, rollouts=self._wait(one, weights_version=weights_version))
            for one in self._ahead
        )
        self._seconds_waited += time.perf_counter() - started
        # Now: what the engines do next, as an evaluation, is none of the step's work.
        self._note_work()

    def _note_work(self) -> None:
        work = self._engines.take_work()
        before = self._work or [EngineWork(tokens=0, seconds=0.0)] * len(work)
        self._work = [one + other for one, other in zip(before, work, strict=True)]

    def _take_work(self) -> tuple[EngineWork, ...]:
        self._note_work()
        work, self._work = tuple(self._work), []
        return work

    def _generate(self, steps: Sequence[int], *, weights_version: int) -> dict[int, list[Rollout]]:
        """The rollouts of steps, generated now: in one call, as an engine is faster with more."""
        function = self._plan.function
        # A function is asked for a step's responses, with what that step's sampling is.
        calls = [list(steps)] if function is None else [[one] for one in steps]
        found: dict[int, list[Rollout]] = {}
        for call in filter(None, calls):
            samplings = [sampling_of_step(one, self._plan.config) for one in call]
            prompts = [
                [replace(prompt, seed=sampling.seed) for prompt in self._prompts_of(one)]
                for one, sampling in zip(call, samplings, strict=True)
            ]
            rollouts = collect(
                self._engines,
                [prompt for of_step in prompts for prompt in of_step],
                replace(samplings[0], logprobs=any(one.logprobs for one in samplings)),
                weights_version=weights_version,
                reader=self._plan.teachers[0].reader,
                function=function,
            )
            for one, of_step, sampling in zip(call, prompts, samplings, strict=True):
                count = len(of_step) * sampling.samples_per_prompt
                own, rollouts = rollouts[:count], rollouts[count:]
                # Asked for because another step compares them.
                found[one] = own if sampling.logprobs else [replace(r, logprobs=None) for r in own]
        return found

    def _wait(self, ahead: _Ahead, *, weights_version: int) -> list[Rollout]:
        """The rollouts of the step that was begun first of those in progress."""
        generated = self._engines.finish(version=weights_version)
        return gather(
            self._engines,
            generated,
            self._prompts_of(ahead.step),
            sampling_of_step(ahead.step, self._plan.config),
            # Newer ones are of shares that were repeated after a failure.
            weights_versions=range(ahead.weights_version, weights_version + 1),
            reader=self._plan.teachers[0].reader,
        )

    def _prompts_of(self, step: int) -> list[Prompt]:
        return sent_prompts_of_step(step, self._prompts, self._plan.config, self._context)

    def _steps_to_begin(self, step: int) -> list[int]:
        """The later steps whose rollouts are begun in this one."""
        config = self._plan.config
        last = self._ahead[-1].step if self._ahead else step
        if self._ahead and not self._overlaps:
            return []  # the next group of steps comes when this one is used up
        steps = []
        for later in range(
            step + 1, min(step + config.rollout.steps_ahead + 1, config.train_iters)
        ):
            # Not over a checkpoint: a resumed run could not repeat rollouts of older weights.
            if checkpoints.is_due(later, config):
                break
            if later > last:
                steps.append(later)
        return steps
