"""All rollout engines of a run, and recovery when one fails."""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.errors import UserError
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
    RolloutEngineError,
    SamplingParams,
    WrongWeightsError,
)
from megatron_oprd.rollout.function import RolloutFunctionError, UserFunction
from megatron_oprd.rollout.sampling import samples_of

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """Description of an engine failure, sent to all ranks."""

    message: str
    is_final: bool  # wrong weights: raised without a restart
    is_users: bool = False  # of the user's function, not of the engine: a UserError


class WeightStream(Protocol):
    """Exports the student's current weights, tensor by tensor; all ranks exhaust it together."""

    def __call__(
        self, *, trainable_only: bool, wanted: bool
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Leaves frozen weights out if ``trainable_only``; yields None where not ``wanted``."""


@dataclass(frozen=True, kw_only=True)
class EngineStarter:
    """Where engines run, how they are started, and how often."""

    # Global rank that each engine is controlled from; one engine a rank at most. The same on all
    # ranks.
    owners: Sequence[int]
    create: Callable[[], RolloutEngine]  # called on owners
    max_restarts: int = 0  # per engine, between two calls of `EnginePool.take_restarts`
    max_restarts_setting: str = "max_restarts"  # its name in messages
    is_shared: bool = False  # all engines use the same servers, to which weights are sent once
    # On ranks that start servers, which need not be owners: starts those that do not respond, and
    # waits for them. Called before engines start and after a failure.
    ensure_server: Callable[[], None] | None = None
    # The same without waiting, for servers that the engines can do without. Called before a sync.
    revive_servers: Callable[[], None] | None = None


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
    weights of the last `sync` and repeats the request; with the same seeds it returns the same
    rollouts. Other engines keep their results. Every method except `take_restarts` and `close` is
    collective over all ranks (on ``context.control``), because all ranks export weights and have to
    learn of failures. These methods raise RolloutEngineError on every rank if an engine failed too
    often.
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
        self._starter = starter
        self._stream = stream
        self._frozen = frozenset(frozen)
        self._context = context
        self._version = 0
        self._bytes_sent = 0
        self._restarts = [0] * len(starter.owners)
        # Index of this rank's engine; None if it owns none.
        self._own = starter.owners.index(context.rank) if context.rank in starter.owners else None
        self._engine: RolloutEngine | None = None
        self._work = EngineWork(tokens=0, seconds=0.0)
        self._work_taken = time.perf_counter()
        self._under_way: deque[tuple[RolloutEngine | None, Sequence[Prompt], SamplingParams]] = (
            deque()
        )
        failures = self._server_failures()
        if not any(failures):
            failures = self.told(self._start())
        for number, failure in enumerate(failures):
            if failure is not None:
                self.close()
                raise RolloutEngineError(
                    f"rollout engine {number}, of rank {starter.owners[number]}, did not start: "
                    f"{failure.message}"
                )

    @property
    def size(self) -> int:
        """The number of engines."""
        return len(self._starter.owners)

    @property
    def own(self) -> int | None:
        """Index of this rank's engine; None if it has none."""
        return self._own

    @phase("weight sync")
    def sync(self, *, version: int = 0) -> int:
        """Sends the current weights to every engine; later rollouts carry ``version``.

        Returns the bytes sent to this rank's engine, failed attempts included. 0 on ranks without
        an engine; for a shared server, nonzero only on the first engine's owner.
        """
        self._version = version
        self._bytes_sent = 0
        if self._starter.revive_servers is not None:
            self._starter.revive_servers()
        take = not self._starter.is_shared or self._own == 0
        self._recover(self.told(self._send_weights(take=take)))
        return self._bytes_sent

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
            if function is not None or not isinstance(self._engine, CountingEngine):
                return ""
            done = self._engine.progress()
            return f"{done.responses} of {asked}, {_rate(done.tokens, seconds)}"

        def at_end(seconds: float) -> str:
            return _rate(self._work.tokens - before, seconds)

        work = f"rollouts, {asked} responses of this rank's engine"
        with heartbeat(work, so_far, at_end=at_end):
            return self._run(generate)

    def take_work(self) -> list[EngineWork]:
        """What each engine did since the last call, of what has come to its end; collective."""
        now = time.perf_counter()
        work = replace(self._work, window=now - self._work_taken)
        self._work, self._work_taken = EngineWork(tokens=0, seconds=0.0), now
        if isinstance(self._engine, MeasuringEngine):
            work = replace(work, use=self._engine.take_use())
        return self.told(work)

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

        self._run(start)
        self._under_way.append((self._engine, prompts, sampling))

    @phase("rollout")
    def finish(self, *, version: int) -> list[Rollout] | None:
        """Waits for the rollouts of the first `start` and returns them as `generate` does."""
        assert self._under_way, "nothing was begun"
        # `version` belongs to the current weights, which an engine restarted below gets. They may
        # be newer than the weights that the rollouts were started with.
        started, prompts, sampling = self._under_way.popleft()
        self._version = version

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
            if not isinstance(self._engine, CountingEngine):
                return ""
            return f"{self._engine.progress().responses} of {asked}"

        with heartbeat("waiting for rollouts that were begun before", so_far):
            return self._run(finish)

    def sleep(self) -> None:
        """Frees engine memory that is not needed until the next `sync`."""
        self._run(lambda engine: engine.sleep())

    def take_restarts(self) -> int:
        """Returns the number of engine restarts since the last call, over all engines."""
        count = sum(self._restarts)
        self._restarts = [0] * self.size
        return count

    def close(self) -> None:
        """Ends this rank's engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _run(self, action: Callable[[RolloutEngine], Result]) -> Result | None:
        """Runs the action on every engine until it succeeds; returns the result on owners."""
        is_due, result = self._own is not None, None
        while True:
            failure = None
            if is_due:
                assert self._engine is not None
                try:
                    result = action(self._engine)
                    # Not repeated here when another engine fails.
                    is_due = False
                except RolloutEngineError as error:
                    failure = _failure(error)
                except UserError as error:
                    failure = _Failure(message=str(error), is_final=True, is_users=True)
            failures = self.told(failure)
            if not any(failures):
                return result
            for of_engine in failures:
                if of_engine is not None and of_engine.is_users:
                    raise RolloutFunctionError(of_engine.message)
            self._recover(failures)

    def _recover(self, failures: list[_Failure | None]) -> None:
        """Restarts failed engines and sends them the weights, until none fails."""
        while any(failures):
            self._count(failures)
            has_failed = self._own is not None and failures[self._own] is not None
            # A shared server gets weights from the first owner, whoever noticed the failure.
            take = self._own == 0 if self._starter.is_shared else has_failed
            while any(of_server := self._server_failures()):
                self._count(of_server)
            failure = None
            if has_failed:
                self.close()
                failure = self._start()
            # Starting takes long: ranks wait for it on the control group, whose timeout allows for
            # that, not in a collective of the weight stream.
            failures = self.told(failure)
            if not any(failures):
                failures = self.told(self._send_weights(take=take))

    def _count(self, failures: list[_Failure | None]) -> None:
        for number, failure in enumerate(failures):
            if failure is None:
                continue
            if failure.is_final or self._restarts[number] == self._starter.max_restarts:
                raise RolloutEngineError(
                    f"rollout engine {number} failed and was not started again "
                    f"({self._restarts[number]} restarts in this step, "
                    f"{self._starter.max_restarts_setting} = {self._starter.max_restarts}): "
                    f"{failure.message}"
                )
            self._restarts[number] += 1
            if self._context.rank == 0:
                logger.warning("rollout engine %d is started again: %s", number, failure.message)

    def _server_failures(self) -> list[_Failure | None]:
        """Runs ``ensure_server`` on the ranks that have it; the first failure as engine 0's."""
        own = None
        if self._starter.ensure_server is not None:
            try:
                self._starter.ensure_server()
            except RolloutEngineError as error:
                own = _failure(error)
        first = next((one for one in self._everyone(own) if one is not None), None)
        return [first, *[None] * (self.size - 1)]

    def _start(self) -> _Failure | None:
        """Starts this rank's engine, if it owns one."""
        _give_up_device_memory()
        if self._own is not None:
            try:
                self._engine = self._starter.create()
            except RolloutEngineError as error:
                return _failure(error)
        return None

    def _send_weights(self, *, take: bool) -> _Failure | None:
        """Streams the weights; if ``take``, this rank's engine receives them."""
        _give_up_device_memory()
        # All engines receive the full stream even if some need less, because all ranks drive it
        # together.
        sends_all = not self._frozen or any(self.told(take and self._needs_all_weights()))
        takes = take and self._engine is not None
        stream, failure = self._stream(trainable_only=not sends_all, wanted=takes), None
        if takes:
            assert self._engine is not None
            try:
                self._engine.load_weights(
                    self._counted(stream),
                    version=self._version,
                    left_out=() if sends_all else self._frozen,
                )
            except RolloutEngineError as error:
                failure = _failure(error)
        # Exhaust the stream if no engine took it or one failed: other ranks wait in its
        # collectives.
        for _ in stream:
            pass
        return failure

    def _needs_all_weights(self) -> bool:
        if self._engine is None:
            return False
        try:
            return self._engine.needs_all_weights()
        except RolloutEngineError:
            return True  # `load_weights` will fail, too, and report the error

    def _counted(self, stream: Iterator[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream:
            if tensor is not None:
                self._bytes_sent += tensor.nbytes
                yield name, tensor

    def told(self, value: Result) -> list[Result]:
        """Gathers the values of all engines' owners on every rank."""
        everyone = self._everyone(value)
        return [everyone[owner] for owner in self._starter.owners]

    def _everyone(self, value: Result) -> list[Result]:
        """Gathers the values of all ranks on every rank."""
        everyone: list[Any] = [None] * self._context.control.size()
        dist.all_gather_object(everyone, value, group=self._context.control)
        return everyone


def _num_responses(prompts: Sequence[Prompt], sampling: SamplingParams) -> int:
    return sum(len(samples_of(prompt, sampling)) for prompt in prompts)


def _rate(tokens: int, seconds: float) -> str:
    rate = tokens / seconds
    return f"{rate:,.0f} tokens/s" if rate >= 10 else f"{rate:.2g} tokens/s"


def _give_up_device_memory() -> None:
    """Returns torch's cached memory to the device, for an engine that starts or wakes there."""
    torch.cuda.empty_cache()


def _failure(error: RolloutEngineError) -> _Failure:
    return _Failure(message=str(error), is_final=isinstance(error, WrongWeightsError))
