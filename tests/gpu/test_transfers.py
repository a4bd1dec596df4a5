"""Weights to another process by vLLM's CUDA IPC, on the trainer's GPU and on another one."""

import importlib.util
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

DTYPE = torch.bfloat16


def tensors() -> Iterator[tuple[str, Tensor]]:
    """Of several sizes, more than fits into the buffer at once."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in {"a": (3, 5), "b": (), "large": (600, 1100), "d": (1, 2, 1)}.items():
        yield name, torch.randn(shape, generator=generator).cuda(0)


class Client:
    """Calls the engine in the other process, for chunks alone."""

    def __init__(self, calls: Connection) -> None:
        self._calls = calls

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.update_weights(init_info)

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: Any) -> None:
        self._calls.send(update_info)
        self._calls.recv()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass


@pytest.mark.parametrize("index", [0, 1])
def test_another_process(index: int) -> None:
    """Every tensor arrives on the engine's device as it was sent."""
    if index >= torch.cuda.device_count():
        pytest.skip(f"needs {index + 1} GPUs")
    from megatron_oprd.rollout.vllm.gpu_transfers import IPCTransfer

    calls, theirs = get_context("spawn").Pipe()
    child = get_context("spawn").Process(target=_take, args=(theirs, index))
    child.start()
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    transfer = IPCTransfer(Client(calls), gpu_uuids=[uuid], dtype=DTYPE, num_bytes=1_320_000)
    transfer.send_weights(tensors())
    calls.send(None)
    arrived = calls.recv()
    child.join()
    transfer.close()
    for name, tensor in tensors():
        values, device = arrived.pop(name)
        assert device == f"cuda:{index}"
        assert values == tensor.to(DTYPE).tolist()
    assert not arrived


def _take(calls: Connection, index: int) -> None:
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    torch.cuda.set_device(index)
    arrived: dict[str, Any] = {}

    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> None:
        arrived.update({name: (one.tolist(), str(one.device)) for name, one in weights})

    settings: Any = SimpleNamespace(parallel_config=None, model_config=None)
    model: Any = SimpleNamespace(load_weights=load_weights)
    device = torch.device("cuda", index)
    engine: Any = IPCWeightTransferEngine(SimpleNamespace(), settings, device, model)
    engine.init_transfer_engine(engine.parse_init_info(calls.recv()))
    calls.send(None)
    while (info := calls.recv()) is not None:
        engine.update_weights(info)
        calls.send(None)
    calls.send(arrived)
