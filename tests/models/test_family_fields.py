"""Every field of transformers' configuration classes is read, refused, or without an effect."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron_oprd.errors import UserError
from megatron_oprd.models.families import FAMILIES, read_architecture
from megatron_oprd.weights.hf_files import HFFolder
from tests.helpers.closeness import assert_close_relative
from tests.helpers.tiny import copy_with_config, tiny_config

MODEL_TYPES = [family.model_type for family in FAMILIES.values()]
# Fields with no effect on a forward pass, and another value of each.
NEUTRAL: dict[str, Any] = {
    "bos_token_id": 3,
    "chunk_size_feed_forward": 2,
    "dtype": "bfloat16",
    "eos_token_id": 4,
    "id2label": {0: "a", 1: "b", 2: "c"},
    "initializer_range": 0.5,
    "label2id": {"a": 0, "b": 1, "c": 2},
    "output_hidden_states": True,
    "pad_token_id": 2,
    "problem_type": "regression",
    "transformers_version": "4.0.0",
    "use_cache": False,
}
# In a family's class only.
NEUTRAL_OF_FAMILY: dict[str, dict[str, Any]] = {
    # While there are no tensors of such layers.
    "deepseek_v3": {"num_mtp_layers": 2, "output_router_logits": True, "pretraining_tp": 2},
    # While layer_types is written out.
    "exaone4": {"sliding_window_pattern": 2},
    # While there are no tensors of such layers.
    "glm4_moe": {"num_mtp_layers": 2, "output_router_logits": True},
    "gpt_oss": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    "llama": {"pretraining_tp": 2},
    # Sequences end before.
    "ministral3": {"max_position_embeddings": 512},
    # While the rotation is not extended.
    "phi3": {"original_max_position_embeddings": 8},
    # While use_sliding_window is off.
    "qwen2": {"max_window_layers": 2, "sliding_window": 2},
    "qwen3": {"max_window_layers": 2, "sliding_window": 2},
    # No model here runs with dropout.
    "seed_oss": {"attention_dropout": 0.3, "residual_dropout": 0.3, "pretraining_tp": 2},
    # While no_rope_layers is written out, and use_sliding_window is off.
    "smollm3": {"no_rope_layer_interval": 2, "sliding_window": 2},
    "minimax_m2": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    # While layer_types is written out.
    "qwen2_moe": {
        "max_window_layers": 2,
        "sliding_window": 2,
        "use_sliding_window": True,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
    },
    "qwen3_5_moe_text": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    # The width of MLPs in layers without experts, and the router's training.
    "qwen3_next": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    "qwen3_moe": {
        "sliding_window": 2,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
    },
}


def neutral(family: str) -> dict[str, Any]:
    return NEUTRAL | NEUTRAL_OF_FAMILY.get(family, {})


# The root of the width, a factor on embeddings, is the same in bf16.
BASE: dict[str, dict[str, Any]] = {
    "gemma2": {"hidden_size": 64},
    "gemma3_text": {"hidden_size": 64},
}


def base(family: str) -> PretrainedConfig:
    return tiny_config(family, bos_token_id=5, **BASE.get(family, {}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("configs")
    for family in MODEL_TYPES:
        config = base(family)
        name = type(config).__name__.removesuffix("Config").removesuffix("Text")
        config.architectures = [f"{name}ForCausalLM"]
        config.save_pretrained(root / family)
    return root


def other(value: Any) -> Any:
    """A value of the same type that is not ``value``."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value or 2
    if isinstance(value, float):
        return value + 0.25
    if isinstance(value, str):
        return "gelu"
    if isinstance(value, list):
        last = "full" if value[-1:] == ["sliding_attention"] else "sliding"
        return [*value[:-1], f"{last}_attention"]
    if isinstance(value, dict):
        if "full_attention" in value:  # a rotation for each kind of layer
            return value | {"full_attention": {"rope_type": "default", "rope_theta": 777.0}}
        return value | {"rope_theta": 777.0}
    assert value is None
    return 8


def fields_of(family: str) -> list[str]:
    return [field.name for field in dataclasses.fields(base(family))]


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_field_is_accounted_for(folders: Path, tmp_path: Path, family: str) -> None:
    config = base(family)
    expected = read_architecture(HFFolder(folders / family))
    without_effect = set()
    for name in fields_of(family):
        value = neutral(family).get(name, other(getattr(config, name)))
        # Transformers 5 writes num_experts under this name.
        drop = ["num_local_experts"] if name == "num_experts" else []
        folder = copy_with_config(folders / family, tmp_path / name, drop=drop, **{name: value})
        try:
            found = read_architecture(HFFolder(folder))
        except UserError as error:
            assert name in str(error)  # noqa: PT017
            continue
        if found == expected:
            without_effect.add(name)
    assert without_effect == neutral(family).keys()


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_fields_without_an_effect_have_none_in_transformers(family: str) -> None:
    assert neutral(family).keys() <= set(fields_of(family))
    config, tokens = base(family), torch.arange(6, 96, 9)[None]
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")

    def logits_with(**fields: Any) -> Tensor:
        changed = AutoModelForCausalLM.from_config(
            type(config)(**(config.to_dict() | fields)), attn_implementation="eager"
        )
        changed.float().eval()
        changed.load_state_dict(model.state_dict())
        return changed(tokens).logits

    expected = logits_with()
    assert_close_relative(logits_with(**neutral(family)), expected, 1e-5)
    moved = (logits_with(rms_norm_eps=0.1) - expected).abs().max()
    assert float(moved) > 1e-2 * float(expected.abs().max())
