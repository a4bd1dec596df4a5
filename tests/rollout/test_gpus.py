"""Engines are over all of a run's GPUs, each on one machine."""

from typing import Any

import pytest
import torch

from megatron_oprd.errors import UserError
from megatron_oprd.rollout.gpus import EnginePlace, divide_gpus, engine_places, visible_gpus

SETTING = "rollout.vllm.tensor_model_parallel_size"


def test_all_gpus_of_all_machines() -> None:
    """Ranks of two machines in turn, as a launcher may number them."""
    ranks = [("a", ["4"]), ("b", ["4"]), ("a", ["6"]), ("b", ["6"]), ("a", ["7"]), ("b", ["5"])]
    assert divide_gpus(ranks, size=1, setting=SETTING) == [
        EnginePlace(owner=rank, gpus=tuple(gpus)) for rank, (_, gpus) in enumerate(ranks)
    ]
    assert divide_gpus(ranks, size=3, setting=SETTING) == [
        EnginePlace(owner=0, gpus=("4", "6", "7")), EnginePlace(owner=1, gpus=("4", "6", "5")),
    ]  # fmt: skip
    with pytest.raises(UserError, match=rf"{SETTING} = 2: .* and a has 3 ranks"):
        divide_gpus(ranks, size=2, setting=SETTING)


def test_on_the_cpu(context: Any) -> None:
    context.device = torch.device("cpu")
    assert engine_places(context, size=1, setting=SETTING) == [EnginePlace(owner=0, gpus=())]
    with pytest.raises(UserError, match=rf"{SETTING} = 2"):
        engine_places(context, size=2, setting=SETTING)


def test_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert visible_gpus(torch.device("cuda", 2), size=1) == ["6"]
    assert visible_gpus(torch.device("cuda", 1), size=3) == ["5", "6", "7"]
    with pytest.raises(UserError, match=r"parallel-size 3: 2 GPUs are there from cuda:2 on"):
        visible_gpus(torch.device("cuda", 2), size=3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert visible_gpus(torch.device("cuda", 2), size=2) == ["2", "3"]
    assert visible_gpus(torch.device("cpu"), size=2) == []
