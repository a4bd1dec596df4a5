"""vLLM's own weight transfer between GPUs: CUDA IPC to an engine, NCCL to a server.

Imported only where the trainer has GPUs; it needs vLLM in the trainer's environment. A test
compares the calls with the installed release (`tests/vllm/test_weight_transfer.py`).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import (
    ParamMeta,
    WeightSource,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.ipc_engine import (
    IPCTrainerInitInfo,
    IPCTrainerWeightTransferEngine,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_open_port

from megatron_oprd.rollout.vllm.shared_memory import Chunk
from megatron_oprd.rollout.vllm.transfer_client import Client


class _Source(WeightSource):
    """vLLM's source of weights; each update sets what it yields."""

    def __init__(self) -> None:
        self.tensors: Iterable[tuple[str, Tensor]] = ()

    def metadata(self) -> list[ParamMeta]:
        """Of a chunk, a list; vLLM asks for it with NCCL only."""
        return [ParamMeta(name, one.dtype, tuple(one.shape)) for name, one in self.tensors]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors)


class _OwnersEngine(IPCTrainerWeightTransferEngine):
    """vLLM's engine, in a process that alone sends to all GPUs of its rollout engine.

    vLLM's has every trainer rank in one rollout engine, sends from each rank to the worker on its
    GPU, and gathers the handles over torch's default group. Here that group has the ranks of many
    engines, of which some may be asleep or fail.
    """

    gpu_uuids: Sequence[str] = ()  # of the rollout engine's workers

    def _all_gather_and_merge_handles(
        self, handles: list[dict[str, tuple]]
    ) -> list[dict[str, tuple]]:
        # Workers on other GPUs map this GPU's memory: CUDA allows it between peers.
        return [dict.fromkeys(self.gpu_uuids, one[self.gpu_uuid]) for one in handles]

    @staticmethod
    def _post_send_sync() -> None:
        # `update_weights` has returned, so that the workers have copied the chunk.
        torch.cuda.ipc_collect()


class IPCTransfer:
    """An `EngineTransfer` by CUDA IPC, through a buffer on the trainer's GPU."""

    def __init__(
        self, client: Client, *, gpu_uuids: Sequence[str], dtype: torch.dtype, num_bytes: int
    ) -> None:
        self._source = _Source()
        self._dtype = dtype
        # This rank is its engine's only sender, whatever its rank in the run.
        info = IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=num_bytes)
        self._engine = _OwnersEngine.trainer_init(info, client=client, source=self._source)
        self._engine.gpu_uuids = gpu_uuids

    def send_weights(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        """See `EngineTransfer`."""
        self._source.tensors = ((name, one.detach().to(self._dtype)) for name, one in stream)
        self._engine.send_weights()

    def close(self) -> None:
        """See `EngineTransfer`."""
        self._engine.shutdown()


class _UpdatesOnly:
    """A client in whose place the caller starts and finishes an update of many chunks."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.init_weight_transfer_engine = client.init_weight_transfer_engine
        self.engine: Any = None  # vLLM's, once it is connected

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: Any) -> None:
        try:
            self._client.update_weights(update_info)
        except BaseException:
            # The broadcast would wait for the workers for ever; this ends it.
            if self.engine is not None:
                self.engine.shutdown()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass


class NCCLTransfer:
    """A `ServerTransfer` by NCCL: this process broadcasts to all workers of the server.

    vLLM describes all tensors before the first is sent. Here a tensor is known when it is gathered;
    so each chunk is an update of its own.
    """

    def __init__(self, client: Client, *, host: str, num_workers: int, num_bytes: int) -> None:
        self._source = _Source()
        info = NCCLTrainerInitInfo(
            rank=0,
            master_address=host,
            master_port=get_open_port(),
            world_size=1 + num_workers,
            packed=True,
            packed_buffer_size_bytes=num_bytes,
        )
        updates = _UpdatesOnly(client)
        self._engine = WeightTransferTrainerFactory.trainer_init(
            info, client=updates, source=self._source
        )
        updates.engine = self._engine

    def send(self, chunk: Chunk) -> None:
        """See `ServerTransfer`."""
        self._source.tensors = chunk
        self._engine.send_weights()

    def close(self) -> None:
        """See `ServerTransfer`."""
        self._engine.shutdown()
