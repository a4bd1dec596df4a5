"""The workers' side of the host's backends: vLLM's WeightTransferEngine through host memory.

Imported by vLLM's factory in the workers' processes, which have the names from `worker.py`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from megatron_oprd.rollout.vllm.shared_memory import keep_freed_memory, map_memory, read
from megatron_oprd.rollout.vllm.sockets import WorkerSocket


@dataclass
class ChunkInfo(WeightTransferUpdateInfo):
    """A chunk of weights, as vLLM's own engines describe it."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offset: int = 0  # first byte in the shared memory
    # Of a piece of a tensor, which it is alone: the tensor's shape, and where the piece is in it.
    whole: list[int] | None = None
    first: int = 0

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of each tensor."""
        return [getattr(torch, name) for name in self.dtype_names]


class _HostEngine(WeightTransferEngine):
    """Loads checkpoint tensors as vLLM's CUDA IPC and NCCL engines do."""

    update_info_cls = ChunkInfo

    def start_weight_update(self) -> None:
        """Has the modules wait for new weights."""
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Ends the waiting; modules that got none keep theirs."""
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Takes a chunk, and returns when the model has it."""
        self.receive_weights(self.parse_update_info(update_info))
        # vLLM's base class does so always, which is an error on a CPU.
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ChunkInfo) -> None:
        """Loads a chunk."""
        tensors = self._tensors(update_info)
        self.model.load_weights(zip(update_info.names, tensors, strict=True))

    def _tensors(self, info: ChunkInfo) -> Iterable[Tensor]:
        raise NotImplementedError


@dataclass
class SharedMemoryInfo(WeightTransferInitInfo):
    """The memory of a `SharedMemoryTransfer`."""

    path: str
    num_bytes: int


class SharedMemoryEngine(_HostEngine):
    """Reads chunks from the trainer's memory."""

    init_info_cls = SharedMemoryInfo
    _values: Tensor
    _divided: Tensor  # a tensor that comes in pieces

    def init_transfer_engine(self, init_info: SharedMemoryInfo) -> None:
        """Maps the memory."""
        keep_freed_memory()
        self._values = map_memory(init_info.path, init_info.num_bytes)

    def receive_weights(self, update_info: ChunkInfo) -> None:
        """Loads a chunk, and a tensor that comes in pieces with its last one."""
        if update_info.whole is None:
            super().receive_weights(update_info)
            return
        ((length,),), (dtype,) = update_info.shapes, update_info.dtypes
        first, after = update_info.first, update_info.first + length
        if first == 0:
            self._divided = torch.empty(math.prod(update_info.whole), dtype=dtype)
        values = self._values[update_info.offset :][: length * dtype.itemsize]
        self._divided[first:after] = values.view(dtype)
        if after == self._divided.numel():
            self.model.load_weights([(*update_info.names, self._divided.view(update_info.whole))])
            del self._divided  # what the model still needs it has

    def _tensors(self, info: ChunkInfo) -> Iterable[Tensor]:
        return read(self._values[info.offset :], dtypes=info.dtypes, shapes=info.shapes)

    def shutdown(self) -> None:
        """Unmaps the memory."""
        self._values = torch.empty(0, dtype=torch.uint8)


@dataclass
class InvitationInfo(WeightTransferInitInfo):
    """Where a `TCPTransfer` listens; see `WorkerSocket`."""

    host: str
    port: int
    token: str
    seconds: float


class TCPEngine(_HostEngine):
    """Reads chunks from a connection to the trainer."""

    init_info_cls = InvitationInfo
    _trainer: WorkerSocket | None = None

    def init_transfer_engine(self, init_info: InvitationInfo) -> None:
        """Connects to the trainer, in place of an earlier one."""
        self.shutdown()
        self._trainer = WorkerSocket(**vars(init_info))

    def _tensors(self, info: ChunkInfo) -> Iterable[Tensor]:
        if self._trainer is None:
            raise RuntimeError("update_weights before init_weight_transfer_engine")
        for shape, dtype in zip(info.shapes, info.dtypes, strict=True):
            yield self._trainer.receive(shape, dtype)

    def shutdown(self) -> None:
        """Disconnects."""
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None
