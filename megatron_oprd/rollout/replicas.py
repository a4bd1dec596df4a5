"""The rollout engines of all data-parallel replicas, and what is done when one of them fails."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.engine import (
    OverlappingEngine,
    Rollout,
    RolloutEngine,
    RolloutEngineError,
    SamplingParams,
    WrongWeightsError,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """What the other ranks are told of an engine that failed."""

    message: str
    is_final: bool


class ReplicaEngines:
    """One rollout engine for each replica, on its leader.

    An engine that fails is started again, gets the weights of the last `sync`, and repeats what it
    was asked for: with the same seeds it gives the same rollouts. Engines of other replicas keep
    what they have done. Every rank has to make every call, since the weights come from all of them
    and a failure has to be known to all; they talk on the context's control groups.
    """

    def __init__(
        self,
        create: Callable[[], RolloutEngine],
        stream: Callable[[bool], Iterator[tuple[str, Tensor | None]]],
        *,
        frozen: Collection[str] = (),
        max_restarts: int,
        is_shared: bool = False,
        ensure_server: Callable[[], None] | None = None,
        context: ParallelContext,
    ) -> None:
        """Starts the engines.

        Args:
            create: Starts an engine; called on leaders.
            stream: The weights as they are; if its argument is true, without ``frozen``. All ranks
                exhaust it together, and leaders get the tensors (`Exporter.stream`).
            frozen: Names of the weights that never change. They are sent only when an engine lacks
                weights.
            max_restarts: How often one engine is started again, from one `take_restarts` to the
                next.
            is_shared: Whether all replicas' engines are one server, which is sent weights once.
            ensure_server: On global rank 0, where the run starts that server: has it answer; called
                before engines are started, and when one of them failed.
            context: This rank's place.

        Raises:
            RolloutEngineError: An engine did not start.
        """
        self._create = create
        self._stream = stream
        self._frozen = frozenset(frozen)
        self._max_restarts = max_restarts
        self._is_shared = is_shared
        self._ensure_server = ensure_server
        self._context = context
        self._version = 0
        self._bytes_sent = 0
        self._restarts = [0] * context.dp_size
        self._engine: RolloutEngine | None = None
        self._under_way: tuple[RolloutEngine | None, Sequence[Prompt], SamplingParams] | None = None
        failures = self._told(self._server_failure())
        if not any(failures):
            failures = self._told(self._start())
        for replica, failure in enumerate(failures):
            if failure is not None:
                self.close()
                raise RolloutEngineError(
                    f"the rollout engine of replica {replica} did not start: {failure.message}"
                )

    def sync(self, *, version: int = 0) -> int:
        """Gives every engine the weights.

        Args:
            version: The number that rollouts with these weights come back with.

        Returns:
            Bytes of the tensors that this rank's engine was sent, in tries that failed as well; 0
            without an engine, and of one that is shared but on the first replica's leader.

        Raises:
            RolloutEngineError: An engine failed too often.
        """
        self._version = version
        self._bytes_sent = 0
        take = not self._is_shared or self._context.dp_rank == 0
        self._recover(self._told(self._send_weights(take=take)))
        return self._bytes_sent

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout] | None:
        """What the replica's engine answers to its leader's prompts, on leaders; None elsewhere.

        Raises:
            RolloutEngineError: An engine failed too often.
        """
        return self._run(lambda engine: engine.generate(prompts, sampling))

    def start(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Begins what `generate` does, on engines that can; `finish` is the next call.

        Raises:
            RolloutEngineError: An engine failed too often.
        """

        def start(engine: RolloutEngine) -> None:
            assert isinstance(engine, OverlappingEngine)
            engine.start(prompts, sampling)

        self._run(start)
        self._under_way = self._engine, prompts, sampling

    def finish(self, *, version: int) -> list[Rollout] | None:
        """Waits for what was begun, and returns what `generate` does.

        Args:
            version: The version of the weights as they are. An engine that is started again here
                gets these, and its rollouts come with this version.

        Raises:
            RolloutEngineError: An engine failed too often.
        """
        assert self._under_way is not None, "nothing was begun"
        (started, prompts, sampling), self._under_way = self._under_way, None
        self._version = version

        def finish(engine: RolloutEngine) -> list[Rollout]:
            if engine is not started:
                return engine.generate(prompts, sampling)
            assert isinstance(engine, OverlappingEngine)
            return engine.finish()

        return self._run(finish)

    def sleep(self) -> None:
        """Has the engines give up the memory that they do not need until the next `sync`.

        Raises:
            RolloutEngineError: An engine failed too often.
        """
        self._run(lambda engine: engine.sleep())

    def take_restarts(self) -> int:
        """How often engines were started again, all together, since the last time."""
        count = sum(self._restarts)
        self._restarts = [0] * self._context.dp_size
        return count

    def close(self) -> None:
        """Ends this rank's engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _run(self, action: Callable[[RolloutEngine], Result]) -> Result | None:
        """Runs the action on every engine once with success; the result, on leaders."""
        is_due, result = self._context.is_leader, None
        while True:
            failure = None
            if is_due:
                assert self._engine is not None
                try:
                    result = action(self._engine)
                    is_due = False
                except RolloutEngineError as error:
                    failure = _failure(error)
            failures = self._told(failure)
            if not any(failures):
                return result
            self._recover(failures)

    def _recover(self, failures: list[_Failure | None]) -> None:
        """Starts the failed engines again and gives them the weights, until all have them."""
        while any(failures):
            self._count(failures)
            has_failed = failures[self._context.dp_rank] is not None
            take = self._context.dp_rank == 0 if self._is_shared else has_failed
            while any(of_server := self._told(self._server_failure())):
                self._count(of_server)
            failure = None
            if has_failed and self._context.is_leader:
                self.close()
                failure = self._start()
            # Starting takes long, and nobody may wait for it in a collective of the weight stream.
            failures = self._told(failure)
            if not any(failures):
                failures = self._told(self._send_weights(take=take))

    def _count(self, failures: list[_Failure | None]) -> None:
        for replica, failure in enumerate(failures):
            if failure is None:
                continue
            if failure.is_final or self._restarts[replica] == self._max_restarts:
                raise RolloutEngineError(
                    f"the rollout engine of replica {replica} failed and was not started again "
                    f"({self._restarts[replica]} restarts in this step, "
                    f"rollout.vllm.max_restarts = {self._max_restarts}): {failure.message}"
                )
            self._restarts[replica] += 1
            if self._context.rank == 0:
                logger.warning(
                    "the rollout engine of replica %d is started again: %s",
                    replica,
                    failure.message,
                )

    def _server_failure(self) -> _Failure | None:
        """Has the server answer that this rank started, if it did; why it does not."""
        if self._ensure_server is not None:
            try:
                self._ensure_server()
            except RolloutEngineError as error:
                return _failure(error)
        return None

    def _start(self) -> _Failure | None:
        """Starts this rank's engine, if it is a leader."""
        _give_up_device_memory()
        if self._context.is_leader:
            try:
                self._engine = self._create()
            except RolloutEngineError as error:
                return _failure(error)
        return None

    def _send_weights(self, *, take: bool) -> _Failure | None:
        """Streams the weights, with ``take`` into this rank's engine, if it has one."""
        _give_up_device_memory()
        # An engine that needs less takes all the same: the stream is one, of all ranks.
        sends_all = not self._frozen or any(self._told(take and self._needs_all_weights()))
        stream, failure = self._stream(not sends_all), None
        if take and self._engine is not None:
            try:
                self._engine.load_weights(
                    self._counted(stream),
                    version=self._version,
                    left_out=() if sends_all else self._frozen,
                )
            except RolloutEngineError as error:
                failure = _failure(error)
        # Where no engine took it, or one failed on the way: the other ranks count on this one.
        for _ in stream:
            pass
        return failure

    def _needs_all_weights(self) -> bool:
        if self._engine is None:
            return False
        try:
            return self._engine.needs_all_weights()
        except RolloutEngineError:
            return True  # `load_weights` fails in its turn, and its error is told to all

    def _counted(self, stream: Iterator[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream:
            if tensor is not None:
                self._bytes_sent += tensor.nbytes
                yield name, tensor

    def _told(self, value: Result) -> list[Result]:
        """What each replica's leader says, known on every rank afterwards."""
        own: list[Any] = [value]
        dist.broadcast_object_list(
            own, src=self._context.leader, group=self._context.replica_control
        )
        everyone: list[Any] = [None] * self._context.dp_size
        dist.all_gather_object(everyone, own[0], group=self._context.leaders_control)
        return everyone


def _give_up_device_memory() -> None:
    """Lets an engine on this rank's GPU have what torch holds back, before it starts or wakes."""
    torch.cuda.empty_cache()


def _failure(error: RolloutEngineError) -> _Failure:
    return _Failure(message=str(error), is_final=isinstance(error, WrongWeightsError))
