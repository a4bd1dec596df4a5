"""Weights in chunks, and through shared memory."""

import importlib
import math
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_oprd.rollout.engine import RolloutEngineError
from megatron_oprd.rollout.vllm.shared_memory import (
    SharedMemory,
    chunks,
    map_memory,
    read,
    update_info,
)
from megatron_oprd.rollout.vllm.transfers import SharedMemoryTransfer
from tests.helpers.ranks import ROOT


def tensors() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in {"a": (3, 5), "b": (), "c": (7,), "large": (6, 11), "d": (1, 2, 1)}.items():
        yield name, torch.randn(shape, generator=generator)
    yield "transposed", torch.arange(20.0).view(4, 5).t()


class Worker:
    """A client whose engine's only worker is here."""

    def __init__(self) -> None:
        self.arrived: dict[str, Tensor] = {}
        self.calls: list[str] = []
        self.before_reading = lambda: None
        self._pieces: list[Tensor] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append("init")
        self._values = map_memory(**init_info)

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, update_info: Any) -> None:
        self.calls.append("update")
        self.before_reading()
        dtypes = [getattr(torch, name) for name in update_info["dtype_names"]]
        values = self._values[update_info["offset"] :]
        came = dict(
            zip(
                update_info["names"],
                read(values, dtypes=dtypes, shapes=update_info["shapes"]),
                strict=True,
            )
        )
        if "whole" in update_info:
            ((name, piece),) = came.items()
            assert update_info["first"] == sum(one.numel() for one in self._pieces)
            self._pieces.append(piece)
            together = torch.cat(self._pieces)
            if together.numel() < math.prod(update_info["whole"]):
                return
            came = {name: together.view(update_info["whole"])}
            self._pieces = []
        self.arrived |= came

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append("finish")


@pytest.mark.parametrize(
    ("elements", "dtype", "updates"),
    [(10, torch.float32, 13), (66, torch.float32, 3), (10**4, torch.bfloat16, 1)],
)
def test_every_tensor_arrives(elements: int, dtype: torch.dtype, updates: int) -> None:
    worker = Worker()
    size = dtype.itemsize
    transfer = SharedMemoryTransfer(worker, dtype=dtype, num_bytes=2 * elements * size)
    for _ in range(2):
        worker.arrived.clear()
        transfer.send_weights(tensors())
        assert list(worker.arrived) == [name for name, _ in tensors()]
        for name, tensor in tensors():
            assert worker.arrived[name].dtype == dtype
            assert torch.equal(worker.arrived[name], tensor.to(dtype))
    assert worker.calls == ["init", *(["start", *["update"] * updates, "finish"] * 2)]
    transfer.close()


@pytest.fixture
def host_engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The workers' module, which imports vLLM, with the stand-in."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "fakes" / "vllm_stand_in")
    name = "megatron_oprd.rollout.vllm.host_engines"
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)  # it is for all of a process
    yield module
    for one in [one for one in sys.modules if one == name or one.partition(".")[0] == "vllm"]:
        del sys.modules[one]


def test_workers_put_pieces_together(host_engines: Any) -> None:
    """The model gets every tensor once and whole, after two syncs those of the second."""
    loaded: list[tuple[str, Tensor]] = []
    engine = host_engines.SharedMemoryEngine(SimpleNamespace(load_weights=loaded.extend))

    class Client(Worker):
        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
            engine.init_transfer_engine(engine.init_info_cls(**init_info))

        def update_weights(self, update_info: Any) -> None:
            engine.update_weights(update_info)

    transfer = SharedMemoryTransfer(Client(), dtype=torch.float32, num_bytes=2 * 10 * 4)
    for factor in (1, 2):
        loaded.clear()
        transfer.send_weights((name, factor * tensor) for name, tensor in tensors())
        for (name, found), (expected_name, expected) in zip(loaded, tensors(), strict=True):
            assert name == expected_name
            assert torch.equal(found, factor * expected)
    transfer.close()


def test_a_half_stays_until_it_is_read() -> None:
    """While a worker reads one half the other is filled, and that one is not touched."""
    worker, sent = Worker(), threading.Semaphore(0)
    waits = []
    worker.before_reading = lambda: waits.append(sent.acquire(timeout=20))
    transfer = SharedMemoryTransfer(worker, dtype=torch.float32, num_bytes=128)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for number in range(6):
            if number >= 2:
                sent.release()  # when the second chunk is complete, the first is read
            yield str(number), torch.full((16,), float(number))
        for _ in range(2):
            sent.release()

    transfer.send_weights(stream())
    for number in range(6):
        assert torch.equal(worker.arrived[str(number)], torch.full((16,), float(number)))
    assert waits == [True] * 6
    transfer.close()


def test_an_error_of_an_update_is_raised() -> None:
    """And the stream is not read further than a chunk ahead."""
    worker = Worker()

    def fail() -> None:
        raise RolloutEngineError("out of memory")

    worker.before_reading = fail
    transfer = SharedMemoryTransfer(worker, dtype=torch.float32, num_bytes=128)
    stream = iter([(str(i), torch.zeros(16)) for i in range(9)])
    with pytest.raises(RolloutEngineError, match="out of memory"):
        transfer.send_weights(stream)
    assert len(list(stream)) == 6
    assert "finish" not in worker.calls
    transfer.close()


def test_chunks_are_as_large_as_they_may_be() -> None:
    found = list(chunks(tensors(), dtype=torch.float32, num_bytes=23 * 4))
    assert [[name for name, _ in chunk] for chunk in found] == [
        ["a", "b", "c"],
        ["large"],
        ["d", "transposed"],
    ]
    assert update_info(found[0]) == {
        "names": ["a", "b", "c"],
        "dtype_names": ["float32"] * 3,
        "shapes": [[3, 5], [], [7]],
    }
    assert not list(chunks([], dtype=torch.float32, num_bytes=1))


def test_memory_is_given_back() -> None:
    memory = SharedMemory(64)
    path = memory.path
    memory.close()
    memory.close()
    with pytest.raises(RuntimeError):
        map_memory(path, 64)
