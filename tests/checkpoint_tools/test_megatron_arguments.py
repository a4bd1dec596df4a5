"""Foreign Megatron checkpoints: their own arguments count, and nothing of their pickles is run."""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.enums import ModelType

from checkpoint_tools.hf_to_megatron import main as hf_to_megatron
from megatron_oprd.errors import UserError
from megatron_oprd.models.argument_checks import check_arguments
from megatron_oprd.models.families import FAMILIES
from megatron_oprd.models.open_checkpoint import open_checkpoint
from tests.helpers.tiny import save_tiny_model, tiny_config

# As Megatron-LM's and Megatron-Bridge's training write them of this model.
ARGS: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4,
    "group_query_attention": True, "num_query_groups": 2, "kv_channels": 8, "rotary_base": 10000,
    "rotary_percent": 1.0, "norm_epsilon": 1e-6, "apply_layernorm_1p": False,
    "rotary_interleaved": False, "add_bias_linear": False, "add_qkv_bias": False,
    "qk_layernorm": False, "swiglu": True, "normalization": "RMSNorm", "moe_router_topk": 2,
    "untie_embeddings_and_output_weights": True, "num_experts": None, "use_rope_scaling": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a Hugging Face configuration, and the model's folder."""
    root = tmp_path_factory.mktemp("arguments")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    save_tiny_model(root / "hf", tiny_config("llama", rope_parameters=rope), seed=0)
    assert hf_to_megatron(["--hf", str(root / "hf"), "--out", str(root / "megatron")]) == 0
    shutil.rmtree(root / "megatron" / "release" / "hf")
    return root


def with_arguments(converted: Path, folder: Path, changes: dict[str, Any], kind: str) -> Path:
    shutil.copytree(converted / "megatron", folder)
    arguments = ARGS | changes
    release = folder / "release"
    if kind == "common.pt":
        # Real ones hold classes of Megatron's own.
        extra = {"model_type": ModelType.encoder_or_decoder, "params_dtype": torch.bfloat16}
        args = argparse.Namespace(**arguments, **extra)
        torch.save({"args": args, "iteration": 7}, release / "common.pt")
    else:
        arguments["layernorm_epsilon"] = arguments.pop("norm_epsilon")
        model = {"_target_": "a.Provider", "transformer": arguments}
        (release / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    return folder


@pytest.mark.parametrize("kind", ["common.pt", "run_config.yaml"])
def test_arguments_that_agree(converted: Path, tmp_path: Path, kind: str) -> None:
    folder = with_arguments(converted, tmp_path / "megatron", {}, kind)
    open_checkpoint(folder, hf_config=converted / "hf").check_tensors()


@pytest.mark.parametrize("kind", ["common.pt", "run_config.yaml"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_base": 500000}, r"rope_theta = 10000\.0 where .* says rotary_base = 500000"),
        ({"norm_epsilon": 1e-3}, r"rms_norm_eps = 1e-06 where .*epsilon = 0\.001"),
        ({"num_attention_heads": 2, "kv_channels": 16}, r"num_attention_heads = 4 .*head_dim = 8"),
        ({"qk_layernorm": True}, "qk_layernorm = True"),
        ({"add_qkv_bias": True}, "add_qkv_bias = True"),
        ({"use_rope_scaling": True}, "use_rope_scaling = True"),
        ({"apply_layernorm_1p": True}, r"1 \+ weight = False where .*apply_layernorm_1p = True"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, "activation_func = "),
        ({"no_rope_freq": [0, 1]}, "no_rope_freq = "),
        ({"softmax_scale": 0.5}, "softmax_scale = 0.5, which is not supported"),
        ({"rotary_interleaved": True}, "rotary_interleaved = True, which is not supported"),
        ({"add_bias_linear": True}, "o and of the MLP = False where .*add_bias_linear = True"),
        ({"softmax_type": "learnable"}, "sinks = 'vanilla' where .*softmax_type = 'learnable'"),
        ({"activation_func_clamp_value": 7.0}, "clamp of .* = None where .*clamp_value = 7"),
        ({"glu_linear_offset": 1.0}, r"added to ups = 0\.0 where .*glu_linear_offset = 1"),
        ({"quick_geglu": True}, "quick GELU of gates = False where .*quick_geglu = True"),
        ({"position_embedding_type": "yarn"}, "rope_type = 'rope' where .*embedding_type = 'yarn'"),
        ({"seq_len_interpolation_factor": 4}, "linear rope factor = 1 where .*factor = 4"),
        ({"window_size": [128, 0]}, r"sliding_window = None in layers \[\] where .*window_size = "),
        ({"window_size": [128, 64]}, "window_size = .*not supported"),
    ],
)
def test_contradictions_are_named(
    converted: Path, tmp_path: Path, changes: dict[str, Any], message: str, kind: str
) -> None:
    folder = with_arguments(converted, tmp_path / "megatron", changes, kind)
    with pytest.raises(UserError, match=message) as raised:
        open_checkpoint(folder, hf_config=converted / "hf")
    assert kind in str(raised.value)


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_no_code_of_a_checkpoint_runs(converted: Path, tmp_path: Path) -> None:
    folder = with_arguments(
        converted, tmp_path / "megatron", {"x": _Evil(tmp_path / "ran")}, "common.pt"
    )
    with pytest.raises(UserError, match=r"common\.pt cannot be read"):
        open_checkpoint(folder, hf_config=converted / "hf")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_is_named(converted: Path, tmp_path: Path) -> None:
    folder = with_arguments(converted, tmp_path / "megatron", {}, "common.pt")
    (folder / "release" / "common.pt").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"common\.pt cannot be read"):
        open_checkpoint(folder, hf_config=converted / "hf")


def test_a_second_configuration_is_refused(converted: Path, tmp_path: Path) -> None:
    assert hf_to_megatron(["--hf", str(converted / "hf"), "--out", str(tmp_path / "m")]) == 0
    with pytest.raises(UserError, match=r"--hf-config.*carries a configuration of its own"):
        open_checkpoint(tmp_path / "m", hf_config=converted / "hf")


def test_an_adapter_is_refused(converted: Path, tmp_path: Path) -> None:
    folder = with_arguments(converted, tmp_path / "megatron", {}, "run_config.yaml")
    file = folder / "release" / "run_config.yaml"
    file.write_text(json.dumps({"model": {}, "peft": {"dim": 8}}))
    with pytest.raises(UserError, match="adapter"):
        open_checkpoint(folder, hf_config=converted / "hf")


OF_GPT_OSS = {
    "add_bias_linear": True, "add_qkv_bias": False, "quick_geglu": True, "swiglu": False,
    "glu_linear_offset": 1, "activation_func_clamp_value": 0.75, "softmax_type": "learnable",
    "activation_func": {"_target_": "megatron.core.activations.quick_gelu"},
}  # fmt: skip


@pytest.mark.parametrize("other", [{}, {"softmax_type": "vanilla"}, {"add_bias_linear": False}])
def test_sinks_biases_and_activation(other: dict[str, Any]) -> None:
    architecture = FAMILIES["GptOssForCausalLM"].architecture(tiny_config("gpt_oss"), "config.json")
    if not other:
        check_arguments("folder", "args", OF_GPT_OSS, architecture, "config")
        return
    with pytest.raises(UserError, match=f"where its args says {next(iter(other))} = "):
        check_arguments("folder", "args", OF_GPT_OSS | other, architecture, "config")


WINDOW = {"window_size": [4, 0]}


@pytest.mark.parametrize(
    ("arguments", "agrees"),
    [
        (WINDOW | {"window_attn_skip_freq": 2}, True),  # every layer but each second one
        (WINDOW | {"window_attn_skip_freq": [1, 0, 1, 0]}, True),
        (WINDOW | {"window_attn_skip_freq": [0, 1, 0, 1]}, False),
        (WINDOW | {"window_attn_skip_freq": None}, False),
        ({"window_size": [5, 0], "window_attn_skip_freq": 2}, False),
        ({"window_size": None}, False),
        ({}, True),  # nothing is said
    ],
)
def test_windows(arguments: dict[str, Any], agrees: bool) -> None:
    """Megatron counts the positions before a token, transformers the token as well."""
    config = tiny_config(
        "qwen2",
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    architecture = FAMILIES["Qwen2ForCausalLM"].architecture(config, "config.json")
    if agrees:
        check_arguments("folder", "args", arguments | {"num_layers": 4}, architecture, "config")
        return
    with pytest.raises(UserError, match=r"sliding_window = 5 in layers \[0, 2\] .*window_size"):
        check_arguments("folder", "args", arguments | {"num_layers": 4}, architecture, "config")
