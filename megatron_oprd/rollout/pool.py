"""All rollout engines of a run: what they are asked for, and how long it took."""

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.heartbeat import heartbeat
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.phases import phase
from megatron_oprd.rollout.engine import (
    CountingEngine,
    EngineUse,
    MeasuringEngine,
    OverlappingEngine,
    Rollout,
    RolloutEngine,
    SamplingParams,
)
from megatron_oprd.rollout.function import UserFunction
from megatron_oprd.rollout.recovery import EngineStarter, RecoveringEngines, WeightStream
from megatron_oprd.rollout.sampling import samples_of

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class EngineWork:
    """What an engine generated, and how long it took."""

    tokens: int  # of responses
    seconds: float  # wall-clock, of `EnginePool.generate` on its owner; not in the background
    use: EngineUse | None = None  # None if the engine does not measure it
    window: float = 0.0  # wall-clock since the call of `take_work` before

    def __add__(self, other: "EngineWork") -> "EngineWork":
        """The work of both times together."""
        use = self.use or other.use
        return EngineWork(
            tokens=self.tokens + other.tokens,
            seconds=self.seconds + other.seconds,
            use=self.use + other.use if self.use and other.use else use,
            window=self.window + other.window,
        )


class EnginePool:
    """The rollout engines of a run, each controlled from the rank that owns it.

    Their number has nothing to do with the trainer's layout. A failed engine is restarted, gets the
    weights of the last `sync` and repeats the request (`RecoveringEngines`); with the same seeds it
    returns the same rollouts. Every method except `take_restarts` and `close` is collective over
    all ranks (on ``context.control``), and raises RolloutEngineError on every rank if an engine
    failed too often.
    """

    def __init__(
        self,
        starter: EngineStarter,
        stream: WeightStream,
        *,
        # Names of weights that never change; sent only if an engine lacks weights.
        frozen: Collection[str] = (),
        context: ParallelContext,
    ) -> None:
        """Starts the engines; raises RolloutEngineError on every rank if one does not start."""
        self._engines = RecoveringEngines(starter, stream, frozen=frozen, context=context)
        self._work = EngineWork(tokens=0, seconds=0.0)
        self._work_taken = time.perf_counter()
        self._under_way: deque[tuple[RolloutEngine | None, Sequence[Prompt], SamplingParams]] = (
            deque()
        )

    @property
    def size(self) -> int:
        """The number of engines."""
        return self._engines.size

    @property
    def own(self) -> int | None:
        """Index of this rank's engine; None if it has none."""
        return self._engines.own

    @phase("weight sync")
    def sync(self, *, version: int = 0) -> int:
        """Sends the current weights to every engine; later rollouts carry ``version``.

        Returns the bytes sent to this rank's engine, failed attempts included. 0 on ranks without
        an engine; for a shared server, nonzero only on the first engine's owner.
        """
        self._engines.version = version
        return self._engines.sync()

    @phase("rollout")
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        function: UserFunction | None = None,  # makes the responses with the engine; None: plain
    ) -> list[Rollout] | None:
        """Generates for this engine's ``prompts``; returns None on ranks without an engine.

        Raises RolloutFunctionError on every rank if ``function`` makes a mistake.
        """

        def generate(engine: RolloutEngine) -> list[Rollout]:
            started = time.perf_counter()
            if function is None:
                rollouts = engine.generate(prompts, sampling)
            else:
                rollouts = function.generate(engine, prompts, sampling)
            self._add_work(rollouts, time.perf_counter() - started)
            return rollouts

        asked = _num_responses(prompts, sampling)

        before = self._work.tokens

        def so_far(seconds: float) -> str:
            # A function asks the engine several times; its own count is not known.
            if function is not None or not isinstance(self._engines.engine, CountingEngine):
                return ""
            done = self._engines.engine.progress()
            return f"{done.responses} of {asked}, {_rate(done.tokens, seconds)}"

        def at_end(seconds: float) -> str:
            return _rate(self._work.tokens - before, seconds)

        work = f"rollouts, {asked} responses of this rank's engine"
        with heartbeat(work, so_far, at_end=at_end):
            return self._engines.run(generate)

    def take_work(self) -> list[EngineWork]:
        """What each engine did since the last call, of what has come to its end; collective."""
        now = time.perf_counter()
        work = replace(self._work, window=now - self._work_taken)
        self._work, self._work_taken = EngineWork(tokens=0, seconds=0.0), now
        if isinstance(self._engines.engine, MeasuringEngine):
            work = replace(work, use=self._engines.engine.take_use())
        return self._engines.told(work)

    def _add_work(self, rollouts: Sequence[Rollout], seconds: float) -> None:
        self._work = replace(
            self._work,
            tokens=self._work.tokens + sum(one.num_written for one in rollouts),
            seconds=self._work.seconds + seconds,
        )

    def start(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Starts `generate` in the background; see `OverlappingEngine`."""

        def start(engine: RolloutEngine) -> None:
            assert isinstance(engine, OverlappingEngine)
            engine.start(prompts, sampling)

        self._engines.run(start)
        self._under_way.append((self._engines.engine, prompts, sampling))

    @phase("rollout")
    def finish(self, *, version: int) -> list[Rollout] | None:
        """Waits for the rollouts of the first `start` and returns them as `generate` does."""
        assert self._under_way, "nothing was begun"
        # `version` belongs to the current weights, which an engine restarted below gets. They may
        # be newer than the weights that the rollouts were started with.
        started, prompts, sampling = self._under_way.popleft()
        self._engines.version = version

        def finish(engine: RolloutEngine) -> list[Rollout]:
            # Restarted meanwhile: the new engine does not have the request.
            if engine is not started:
                rollouts = engine.generate(prompts, sampling)
            else:
                assert isinstance(engine, OverlappingEngine)
                rollouts = engine.finish()
            # How long it took is the engine's own to say (`EngineUse`).
            self._add_work(rollouts, 0.0)
            return rollouts

        asked = _num_responses(prompts, sampling)

        def so_far(seconds: float) -> str:
            # A new engine has begun anew; an old one's tokens took longer than this wait.
            if not isinstance(self._engines.engine, CountingEngine):
                return ""
            return f"{self._engines.engine.progress().responses} of {asked}"

        with heartbeat("waiting for rollouts that were begun before", so_far):
            return self._engines.run(finish)

    def sleep(self) -> None:
        """Frees engine memory that is not needed until the next `sync`."""
        self._engines.run(lambda engine: engine.sleep())

    def take_restarts(self) -> int:
        """Returns the number of engine restarts since the last call, over all engines."""
        return self._engines.take_restarts()

    def told(self, value: Result) -> list[Result]:
        """Gathers the values of all engines' owners on every rank."""
        return self._engines.told(value)

    def close(self) -> None:
        """Ends this rank's engine."""
        self._engines.close()


def _num_responses(prompts: Sequence[Prompt], sampling: SamplingParams) -> int:
    return sum(len(samples_of(prompt, sampling)) for prompt in prompts)


def _rate(tokens: int, seconds: float) -> str:
    rate = tokens / seconds
    return f"{rate:,.0f} tokens/s" if rate >= 10 else f"{rate:.2g} tokens/s"
