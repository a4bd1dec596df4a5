"""The workers' side of the host's backends: vLLM's WeightTransferEngine through host memory.

Imported by vLLM's factory in the workers' processes, which have the names from `worker.py`.
"""

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

    def init_transfer_engine(self, init_info: SharedMemoryInfo) -> None:
        """Maps the memory."""
        keep_freed_memory()
        self._values = map_memory(init_info.path, init_info.num_bytes)

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
