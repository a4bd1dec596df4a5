"""What of the installed vLLM's weight transfer the GPUs' paths call, which run on no CPU."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor


def parameters(of: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(of).parameters)


def test_trainers_engines() -> None:
    from vllm.distributed.weight_transfer import (
        ParamMeta,
        TrainerWeightTransferEngine,
        WeightSource,
        WeightTransferTrainerFactory,
    )
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.utils.network_utils import get_open_port

    assert parameters(ParamMeta) == ["name", "dtype", "shape"]
    assert WeightSource.__abstractmethods__ == {"metadata", "__iter__"}
    assert parameters(WeightTransferTrainerFactory.trainer_init) == [
        "init_info",
        "client",
        "source",
    ]
    assert parameters(TrainerWeightTransferEngine.send_weights) == ["self"]
    assert parameters(TrainerWeightTransferEngine.shutdown) == ["self"]
    assert {"master_address", "master_port", "world_size", "packed"} <= set(
        parameters(NCCLTrainerInitInfo)
    )
    assert NCCLTrainerInitInfo.backend == "nccl"
    assert not [
        name
        for name, one in inspect.signature(get_open_port).parameters.items()
        if one.default is inspect.Parameter.empty
    ]


def test_engine_of_an_owner() -> None:
    """The two private methods are those that gather over, and wait for, the default group."""
    from vllm.distributed.weight_transfer.ipc_engine import (
        IPCTrainerInitInfo,
        IPCTrainerWeightTransferEngine,
        IPCWeightTransferUpdateInfo,
    )

    from megatron_oprd.rollout.vllm.gpu_transfers import _OwnersEngine

    info = IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=10)
    assert info.backend == "ipc"
    assert info.is_sender
    for name in ("_all_gather_and_merge_handles", "_post_send_sync"):
        theirs, ours = getattr(IPCTrainerWeightTransferEngine, name), getattr(_OwnersEngine, name)
        assert parameters(ours) == parameters(theirs)
    others = set(vars(IPCTrainerWeightTransferEngine)) - {
        "_all_gather_and_merge_handles",
        "_post_send_sync",
    }
    for name in others:
        one = inspect.getattr_static(IPCTrainerWeightTransferEngine, name)
        if inspect.isfunction(one):
            assert "distributed" not in inspect.getsource(one), name
    engine: Any = object.__new__(_OwnersEngine)
    engine.gpu_uuid, engine.gpu_uuids = "a", ["a", "b"]
    assert engine._all_gather_and_merge_handles([{"a": (1, 2)}]) == [{"a": (1, 2), "b": (1, 2)}]
    fields = [one.name for one in dataclasses.fields(IPCWeightTransferUpdateInfo)]
    assert fields[:4] == ["names", "dtype_names", "shapes", "ipc_handles"]
    assert parameters(rebuild_cuda_tensor).index("storage_device") == 6


def test_workers_engines() -> None:
    """Both of vLLM's load weights through the model's method, which a worker watches."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    for engine in (IPCWeightTransferEngine, NCCLWeightTransferEngine):
        assert "self.model.load_weights" in inspect.getsource(engine.receive_weights)


def test_calls_of_an_engine_and_of_a_server() -> None:
    from vllm import LLM
    from vllm.entrypoints.rl.online.api_router import router

    assert parameters(LLM.init_weight_transfer_engine) == ["self", "request"]
    assert parameters(LLM.start_weight_update) == ["self"]
    assert parameters(LLM.update_weights) == ["self", "request"]
    assert parameters(LLM.finish_weight_update) == ["self", "weight_version"]
    paths = {route.path for route in router.routes}
    assert paths >= {
        "/init_weight_transfer_engine",
        "/shutdown_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/update_weight_version",
        "/weight_info",
    }


class Calls:
    """A client that remembers what it is told."""

    def __init__(self) -> None:
        self.updates: list[Any] = []
        self.others: list[str] = []
        self.error: Exception | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.init_info = init_info

    def start_weight_update(self) -> None:
        self.others.append("start")

    def update_weights(self, update_info: Any) -> None:
        if self.error is not None:
            raise self.error
        self.updates.append(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.others.append("finish")


class Group:
    """In place of a communicator: what was broadcast, and whether it was ended."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.is_ended = False

    def destroy(self) -> None:
        self.is_ended = True


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    """vLLM's NCCL engine without NCCL: the rest is vLLM's code."""
    from vllm.distributed.weight_transfer import nccl_engine

    group = Group()

    def broadcast(iterator: Iterator[tuple[str, Tensor]], group: Group, **options: Any) -> None:
        group.sent += [tensor for _, tensor in iterator]

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: group)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    return group


def test_chunks_by_nccl(group: Group) -> None:
    """vLLM's engine sends each chunk as an update, and leaves start and finish to the caller."""
    from megatron_oprd.rollout.vllm.gpu_transfers import NCCLTransfer

    calls = Calls()
    transfer = NCCLTransfer(calls, host="10.0.0.1", num_workers=4, num_bytes=10**6)
    assert calls.init_info["world_size"] == 5
    assert calls.init_info["rank_offset"] == 1
    assert calls.init_info["master_address"] == "10.0.0.1"
    chunks = [
        [("a", torch.arange(6.0).view(2, 3)), ("b", torch.zeros(()))],
        [("c", torch.ones(4, dtype=torch.bfloat16))],
    ]
    for chunk in chunks:
        transfer.send(chunk)
    assert calls.updates == [
        {"names": ["a", "b"], "dtype_names": ["float32"] * 2, "shapes": [[2, 3], []]},
        {"names": ["c"], "dtype_names": ["bfloat16"], "shapes": [[4]]},
    ]
    assert calls.others == []
    sent = [tensor for chunk in chunks for _, tensor in chunk]
    assert all(torch.equal(one, other) for one, other in zip(group.sent, sent, strict=True))
    transfer.close()
    assert group.is_ended


def test_a_server_that_fails_ends_the_broadcast(group: Group) -> None:
    from megatron_oprd.rollout.vllm.gpu_transfers import NCCLTransfer

    calls = Calls()
    transfer = NCCLTransfer(calls, host="10.0.0.1", num_workers=1, num_bytes=10**6)
    calls.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        transfer.send([("a", torch.zeros(3))])
    assert group.is_ended
