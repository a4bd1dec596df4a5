"""How weights get from the trainer into vLLM's workers: vLLM's init, start, update and finish.

| engine | on GPUs (`gpu_transfers.py`) | on the host |
|---|---|---|
| process of the trainer's machine | vLLM's CUDA IPC | shared memory |
| server | vLLM's NCCL broadcast | TCP |

The calls are vLLM's everywhere; a backend only carries the tensors of an update. The host's
backends are registered with vLLM's factory (`host_engines.py`).
"""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from megatron_oprd.rollout.vllm.shared_memory import (
    Chunk,
    SharedMemory,
    aligned,
    chunks,
    pieces,
    update_info,
    write,
)
from megatron_oprd.rollout.vllm.sockets import TrainerSocket
from megatron_oprd.rollout.vllm.transfer_client import Client

# Names in vLLM's WeightTransferConfig: its own, and those of `host_engines.py`.
IPC, NCCL = "ipc", "nccl"
SHARED_MEMORY, TCP = "megatron_oprd_shared_memory", "megatron_oprd_tcp"


def transfer_config(on_gpus: bool) -> str:
    """A server's ``--weight-transfer-config``."""
    return json.dumps({"backend": NCCL if on_gpus else TCP})


class EngineTransfer(Protocol):
    """Sends weights to an engine on the trainer's machine."""

    def send_weights(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        """Makes a whole update of the stream's tensors."""

    def close(self) -> None:
        """Frees the memory."""


class ServerTransfer(Protocol):
    """Sends weights to a server, in an update that its caller starts and finishes."""

    def send(self, chunk: Chunk) -> None:
        """Sends a chunk to all workers of the server."""

    def close(self) -> None:
        """Ends the connection."""


def open_engine_transfer(
    client: Client,
    *,
    device: torch.device,  # the trainer's
    gpu_uuids: Sequence[str],  # of the engine's workers; empty on a CPU
    dtype: torch.dtype,
    num_bytes: int,  # of the buffer
    largest: int,  # bytes of the largest tensor, which a GPU's buffer has to hold
) -> EngineTransfer:
    """Connects an engine on the trainer's machine."""
    if device.type == "cuda":
        from megatron_oprd.rollout.vllm.gpu_transfers import IPCTransfer

        size = max(num_bytes, largest)
        return IPCTransfer(client, gpu_uuids=gpu_uuids, dtype=dtype, num_bytes=size)
    return SharedMemoryTransfer(client, dtype=dtype, num_bytes=num_bytes)


def open_server_transfer(
    client: Client, backend: str, *, host: str, num_workers: int, seconds: float, num_bytes: int
) -> ServerTransfer:
    """Connects a server's workers, which reach this process at ``host``.

    Raises OSError or RolloutEngineError if they do not connect.
    """
    if backend == NCCL:
        from megatron_oprd.rollout.vllm.gpu_transfers import NCCLTransfer

        return NCCLTransfer(client, host=host, num_workers=num_workers, num_bytes=num_bytes)
    assert backend == TCP, backend
    return TCPTransfer(client, host=host, num_workers=num_workers, seconds=seconds)


class SharedMemoryTransfer:
    """An `EngineTransfer` through memory with two halves.

    One half is filled while workers read the other.
    """

    def __init__(self, client: Client, *, dtype: torch.dtype, num_bytes: int) -> None:
        self._client = client
        self._dtype = dtype
        self._chunk_bytes = num_bytes // 2
        self._half_bytes = aligned(self._chunk_bytes)
        self._memory = SharedMemory(2 * self._half_bytes)
        self._calls = ThreadPoolExecutor(1)
        client.init_weight_transfer_engine(
            {"path": self._memory.path, "num_bytes": 2 * self._half_bytes}
        )

    def send_weights(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        """See `EngineTransfer`."""
        self._client.start_weight_update()
        under_way: Future[None] | None = None
        try:
            whole = chunks(stream, dtype=self._dtype, num_bytes=self._chunk_bytes)
            # A tensor that is written as one would be read only afterwards.
            parts = (part for chunk in whole for part in pieces(chunk, num_bytes=self._chunk_bytes))
            for number, (part, info) in enumerate(parts):
                # Workers may still read the other half, and no longer this one.
                offset = number % 2 * self._half_bytes
                write(part, self._memory.values[offset:])
                if under_way is not None:
                    under_way.result()
                under_way = self._calls.submit(
                    self._client.update_weights, info | {"offset": offset}
                )
        finally:
            if under_way is not None:
                under_way.exception()  # a call at a time
        if under_way is not None:
            under_way.result()
        self._client.finish_weight_update()

    def close(self) -> None:
        """See `EngineTransfer`."""
        self._calls.shutdown(wait=False)
        self._memory.close()


class TCPTransfer:
    """A `ServerTransfer` by a connection to each worker."""

    def __init__(self, client: Client, *, host: str, num_workers: int, seconds: float) -> None:
        self._client = client
        self._calls = ThreadPoolExecutor(1)
        self._workers = TrainerSocket(host, seconds=seconds)
        try:
            # The call returns when the workers are connected, which takes this process, too.
            joined = self._calls.submit(
                client.init_weight_transfer_engine, self._workers.invitation
            )
            try:
                self._workers.accept(num_workers, in_vain=joined.done)
            except OSError:
                # The server's error explains it, if there is one.
                if joined.done():
                    joined.result()
                raise
            joined.result()
        except BaseException:
            self.close()
            raise

    def send(self, chunk: Chunk) -> None:
        """See `ServerTransfer`."""
        taken = self._calls.submit(self._client.update_weights, update_info(chunk))
        taken.add_done_callback(self._give_up)
        try:
            for _, tensor in chunk:
                self._workers.send(tensor)
        except OSError:
            taken.result()  # the server's error explains it, if there is one
            raise
        taken.result()

    def _give_up(self, call: Future[None]) -> None:
        """Ends the sending to workers that do not read, which would wait until its time is over."""
        if call.exception() is not None:
            self._workers.give_up()

    def close(self) -> None:
        """See `ServerTransfer`."""
        self._workers.close()
        self._calls.shutdown(wait=False)
