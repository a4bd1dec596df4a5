"""Rollout engines that are started again when they fail, and get the weights again."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.errors import UserError
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.engine import RolloutEngine, RolloutEngineError, WrongWeightsError
from megatron_oprd.rollout.function import RolloutFunctionError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


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


class WeightStream(Protocol):
    """Exports the student's current weights, tensor by tensor; all ranks exhaust it together."""

    def __call__(
        self, *, trainable_only: bool, wanted: bool
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Leaves frozen weights out if ``trainable_only``; yields None where not ``wanted``."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """Description of an engine failure, sent to all ranks."""

    message: str
    is_final: bool  # wrong weights: raised without a restart
    is_users: bool = False  # of the user's function, not of the engine: a UserError


class RecoveringEngines:
    """The engines of a run, each controlled from the rank that owns it.

    A failed engine is restarted, gets the weights and repeats what it was asked; other engines keep
    their results. Methods are collective over all ranks (on ``context.control``), except
    `take_restarts` and `close`, because all ranks export weights and have to learn of failures.
    They raise RolloutEngineError on every rank if an engine failed too often.

    Attributes:
        own: Index of this rank's engine; None if it owns none.
        engine: This rank's engine, while it runs.
        version: Of the weights that engines get, be it in `sync` or after a failure.
    """

    def __init__(
        self,
        starter: EngineStarter,
        stream: WeightStream,
        *,
        frozen: Collection[str],  # names of weights that are sent only if an engine lacks weights
        context: ParallelContext,
    ) -> None:
        """Starts the engines; raises RolloutEngineError on every rank if one does not start."""
        self._starter = starter
        self._stream = stream
        self._frozen = frozenset(frozen)
        self._context = context
        self._bytes_sent = 0
        self._restarts = [0] * self.size
        self.version = 0
        self.own = starter.owners.index(context.rank) if context.rank in starter.owners else None
        self.engine: RolloutEngine | None = None
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

    def sync(self) -> int:
        """Sends the current weights, as ``version``; see `EnginePool.sync`."""
        self._bytes_sent = 0
        if self._starter.revive_servers is not None:
            self._starter.revive_servers()
        take = not self._starter.is_shared or self.own == 0
        self._recover(self.told(self._send_weights(take=take)))
        return self._bytes_sent

    def run(self, action: Callable[[RolloutEngine], Result]) -> Result | None:
        """Runs the action on every engine until it succeeds; returns the result on owners."""
        is_due, result = self.own is not None, None
        while True:
            failure = None
            if is_due:
                assert self.engine is not None
                try:
                    result = action(self.engine)
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

    def take_restarts(self) -> int:
        """Returns the number of engine restarts since the last call, over all engines."""
        count = sum(self._restarts)
        self._restarts = [0] * self.size
        return count

    def close(self) -> None:
        """Ends this rank's engine."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def _recover(self, failures: list[_Failure | None]) -> None:
        """Restarts failed engines and sends them the weights, until none fails."""
        while any(failures):
            self._count(failures)
            has_failed = self.own is not None and failures[self.own] is not None
            # A shared server gets weights from the first owner, whoever noticed the failure.
            take = self.own == 0 if self._starter.is_shared else has_failed
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
        if self.own is not None:
            try:
                self.engine = self._starter.create()
            except RolloutEngineError as error:
                return _failure(error)
        return None

    def _send_weights(self, *, take: bool) -> _Failure | None:
        """Streams the weights; if ``take``, this rank's engine receives them."""
        _give_up_device_memory()
        # All engines receive the full stream even if some need less, because all ranks drive it
        # together.
        sends_all = not self._frozen or any(self.told(take and self._needs_all_weights()))
        takes = take and self.engine is not None
        stream, failure = self._stream(trainable_only=not sends_all, wanted=takes), None
        if takes:
            assert self.engine is not None
            try:
                self.engine.load_weights(
                    self._counted(stream),
                    version=self.version,
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
        if self.engine is None:
            return False
        try:
            return self.engine.needs_all_weights()
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


def _give_up_device_memory() -> None:
    """Returns torch's cached memory to the device, for an engine that starts or wakes there."""
    torch.cuda.empty_cache()


def _failure(error: RolloutEngineError) -> _Failure:
    return _Failure(message=str(error), is_final=isinstance(error, WrongWeightsError))
