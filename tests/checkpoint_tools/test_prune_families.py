"""Pruned models of transformers' own classes: right, or refused; never other layers' settings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoint_tools.prune_depth import prune_depth
from megatron_oprd.errors import UserError
from megatron_oprd.models.open_checkpoint import open_checkpoint
from tests.helpers.closeness import assert_close_relative
from tests.helpers.tiny import random_weight, save_tiny_model, tiny_config, with_vision
from tests.weights.test_dequantised import fp8, quantise
from tests.weights.test_mxfp4 import mxfp4_folder

pytestmark = pytest.mark.long

COMMON: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 4,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
SLIDING = {"sliding_window": 16, "head_dim": 8}
# name: (class, fields, fields that a published config.json leaves out, layers that are kept)
RIGHT: dict[str, tuple[str, dict[str, Any], tuple[str, ...], list[int]]] = {
    "gemma2": ("Gemma2Config", SLIDING, (), [0, 2]),
    "gemma2_as_published": ("Gemma2Config", SLIDING, ("layer_types",), [0, 2]),
    "gemma3_as_published": (
        "Gemma3TextConfig",
        SLIDING | {"num_hidden_layers": 6},
        ("layer_types", "_sliding_window_pattern"),
        [0, 5],
    ),
    "gpt_oss": (
        "GptOssConfig",
        SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
        ("layer_types",),
        [0, 2],
    ),
    "smollm3": (
        "SmolLM3Config",
        {"no_rope_layer_interval": 4},
        ("no_rope_layers", "no_rope_layer_interval"),
        [0, 3],
    ),
    "olmo3": ("Olmo3Config", {"sliding_window": 16}, ("layer_types",), [0, 3]),
    "qwen3_moe": ("Qwen3MoeConfig", MOE | {"mlp_only_layers": [0, 2]}, (), [0, 2, 3]),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "first_k_dense_replace": 3, "head_dim": 8, "num_hidden_layers": 6,
        },
        (),
        [0, 2, 4, 5],
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "num_key_value_heads": 4,
            "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6,
            "v_head_dim": 14, "num_mtp_layers": 0,
        },
        ("layer_types", "mlp_layer_types"),
        [0, 2, 3],
    ),
    "qwen3_next_as_published": (
        "Qwen3NextConfig",
        MOE | {
            "shared_expert_intermediate_size": 24, "linear_key_head_dim": 16,
            "linear_value_head_dim": 6, "linear_num_key_heads": 4, "linear_num_value_heads": 12,
        },
        ("layer_types",),
        [1, 3],
    ),
}  # fmt: skip
# name: (class, fields, the field that has to be named)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "hunyuan": (
        "HunYuanMoEV1Config",
        {"num_experts": 4, "moe_topk": [1, 2, 1, 2], "head_dim": 8},
        "moe_topk",
    ),
    "ernie": (
        "Ernie4_5_MoeConfig",
        {
            "moe_intermediate_size": 24, "moe_k": 2, "moe_num_experts": 4,
            "moe_num_shared_experts": 1, "moe_layer_start_index": 2, "moe_layer_end_index": 3,
        },
        "moe_layer",
    ),
}  # fmt: skip


def save(folder: Path, name: str, fields: dict[str, Any], left_out: tuple[str, ...]) -> None:
    """A model of the class with random weights, and a config.json without some fields."""
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**COMMON | fields))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(random_weight(parameter_name, parameter.shape, generator))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    kept = {field: value for field, value in config.items() if field not in left_out}
    (folder / "config.json").write_text(json.dumps(kept))


def add_to_config(folder: Path, **fields: Any) -> None:
    """Adds fields to a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("name", RIGHT)
def test_equals_the_model_whose_other_layers_do_nothing(tmp_path: Path, name: str) -> None:
    cls, fields, left_out, keep = RIGHT[name]
    save(tmp_path / "hf", cls, fields, left_out)
    prune_depth(tmp_path / "hf", tmp_path / "out", keep, force=False)
    whole, pruned = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder, attn_implementation="eager").eval()
        for folder in ("hf", "out")
    )
    # They stay in their places: decoders look up a layer's kind by its number.
    for number, layer in enumerate(whole.model.layers):
        if number not in keep:
            layer.forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    tokens = torch.arange(3, 63)[None]
    with torch.no_grad():
        found = pruned(tokens, use_cache=False).logits
        assert_close_relative(found, whole(tokens, use_cache=False).logits, 1e-5)


# name: (family, fields, layers that are kept)
NESTED: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    # As many layers as a decoder of the class has by default.
    "gemma3": ("gemma3_text", {"num_hidden_layers": 26, "layer_types": None}, [0, 5, 25]),
    "mistral3": ("mistral", {"sliding_window": 6}, [0, 3]),
    "qwen3_5": ("qwen3_5_text", {}, [1, 2]),
}


@pytest.mark.parametrize("name", NESTED)
def test_the_decoder_beside_parts_for_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    family, fields, keep = NESTED[name]
    save_tiny_model(tmp_path / "hf", with_vision(tiny_config(family, **fields)), seed=0)
    pruned = prune_depth(tmp_path / "hf", tmp_path / "out", keep, force=False)
    assert "logits of 16 tokens are those of the whole model" in capsys.readouterr().err
    whole = load_file(tmp_path / "hf" / "model.safetensors")
    # Qwen3.5's decoder is named within the model.
    inner = "model.language_model." if name == "qwen3_5" else "language_model.model."
    for number, layer in enumerate(keep):
        old, new = (f"layers.{one}.mlp.up_proj.weight" for one in (layer, number))
        assert torch.equal(pruned.read(f"model.{new}"), whole[inner + old])
    assert not any("vis" in tensor for tensor in pruned.names())
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert len(model.model.layers) == len(keep)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]


def test_a_quantised_decoder_beside_parts_for_images(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "hf", with_vision(tiny_config("mistral")), seed=0)
    add_to_config(tmp_path / "hf", quantization_config=fp8([16, 16]))
    with pytest.raises(UserError, match=r"quantization_config, .* with weights in bf16"):
        prune_depth(tmp_path / "hf", tmp_path / "out", [0, 3], force=False)


@pytest.mark.parametrize("form", ["blocks", "compressed_rows"])
def test_fp8_codes_and_scales_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    save_tiny_model(tmp_path / "hf", tiny_config("qwen3"), seed=0)
    expected = quantise(tmp_path / "hf", form, torch.bfloat16)
    prune_depth(tmp_path / "hf", tmp_path / "out", [1, 3], force=False)
    assert "the weights are quantised" in capsys.readouterr().err
    opened = open_checkpoint(tmp_path / "out")
    opened.check_tensors()
    assert opened.architecture.num_layers == 2
    for name in opened.source.names():
        old = name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.1.")
        assert torch.equal(opened.source.read(name), expected[old]), name


def test_mxfp4_codes_and_exponents_are_kept(tmp_path: Path) -> None:
    mxfp4_folder(tmp_path / "hf", num_hidden_layers=4)
    prune_depth(tmp_path / "hf", tmp_path / "out", [0, 3], force=False)
    whole, pruned = (open_checkpoint(tmp_path / folder) for folder in ("hf", "out"))
    pruned.check_tensors()
    # The layers with a window and without one.
    assert pruned.architecture.sliding_layers == (True, False)
    for name in pruned.source.names():
        old = name.replace("layers.1.", "layers.3.")
        assert torch.equal(pruned.source.read(name), whole.source.read(old)), name


def test_layers_whose_names_are_in_the_quantisation_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "hf", tiny_config("qwen3"), seed=0)
    quantise(tmp_path / "hf", "blocks", torch.bfloat16)
    kept = ["lm_head", "model.layers.1.mlp.up_proj"]
    add_to_config(tmp_path / "hf", quantization_config=fp8([16, 16], modules_to_not_convert=kept))
    with pytest.raises(UserError, match=r"modules_to_not_convert.* depends on the layers' numbers"):
        prune_depth(tmp_path / "hf", tmp_path / "out", [0, 3], force=False)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_named(tmp_path: Path, name: str) -> None:
    cls, fields, field = REFUSED[name]
    save(tmp_path / "hf", cls, fields, ())
    with pytest.raises(UserError, match=field):
        prune_depth(tmp_path / "hf", tmp_path / "out", [0, 3], force=False)


@pytest.mark.parametrize(
    "config",
    [
        {"block_configs": [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}]},
        {"linear_attn_config": {"kda_layers": [0, 2]}},
        {"hybrid_override_pattern": "M-*-"},
        {"moe_layers_enum": "1,3"},
        {"per_layer_config": {"0": {"a": 1}, "2": {"a": 2}}},
        {"num_kv_shared_layers": 2},
        {"moe_layer_start_index": 1},
        {"nested": {"deeper": [1, 2, 3, 4]}},
    ],
)
def test_unknown_fields_of_layers_at_any_depth(tmp_path: Path, config: dict[str, Any]) -> None:
    save(tmp_path / "hf", "LlamaConfig", {}, ())
    add_to_config(tmp_path / "hf", **config)
    with pytest.raises(UserError, match=f"{next(iter(config))}.* depends on the layers' numbers"):
        prune_depth(tmp_path / "hf", tmp_path / "out", [0, 3], force=False)
