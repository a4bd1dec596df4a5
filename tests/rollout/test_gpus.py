"""An engine's GPUs are its replica's, on one machine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_oprd.errors import UserError
from megatron_oprd.rollout.gpus import engine_gpus, gpus_beside_the_first, visible_gpus

SETTING = "rollout.vllm.tensor_model_parallel_size"


def test_the_leaders_machine() -> None:
    """Tensor ranks of the first stage, then of the second; two of each are on another machine."""
    places = [("a", ["4"]), ("b", ["4"]), ("a", ["6"]), ("b", ["6"])]
    assert gpus_beside_the_first(places, size=1, setting=SETTING) == ["4"]
    assert gpus_beside_the_first(places, size=2, setting=SETTING) == ["4", "6"]
    with pytest.raises(UserError, match=r"parallel_size = 3: .* and a has 2 of them"):
        gpus_beside_the_first(places, size=3, setting=SETTING)


def test_on_the_cpu(context: Any) -> None:
    place = SimpleNamespace(device=torch.device("cpu"), replica_control=context.replica_control)
    assert engine_gpus(place, size=1, setting=SETTING) == []  # type: ignore[arg-type]
    with pytest.raises(UserError, match="parallel_size = 2"):
        engine_gpus(place, size=2, setting=SETTING)  # type: ignore[arg-type]


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
