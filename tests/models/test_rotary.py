"""Frequencies and attention factor against transformers' rotary modules and formulas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb

from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.families import read_architecture
from megatron_oprd.models.rotary import (
    RotaryTransformerConfig,
    has_fused_rotation,
    inverse_frequencies,
)
from megatron_oprd.weights.hf_files import HFFolder
from tests.helpers.closeness import assert_close_relative
from tests.helpers.tiny import tiny_config

CONFIGS = Path(__file__).parent / "configs"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.2, 4.0, 20.0],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {"head_dim": 64, "rope_parameters": {"rope_theta": 1e6}}),
    # Heads of other than hidden / heads dimensions.
    "default_qwen3": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 7}}),
    "llama3": ("llama", {"head_dim": 64, "rope_parameters": LLAMA3}),
    "linear": (
        "mistral",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    ),
    "dynamic": (
        "llama",
        {"head_dim": 64, "max_position_embeddings": 65}
        | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "yarn": ("qwen3", {"head_dim": 64, "rope_parameters": YARN}),
    "yarn_attention_factor": ("qwen2", {"rope_parameters": YARN | {"attention_factor": 0.9}}),
    "yarn_of_whole_fields": (
        "qwen3",
        {
            "head_dim": 64,
            "rope_parameters": YARN
            | {"beta_fast": 8, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 1.3}
            | {"truncate": False},
        },
    ),
    # Both ends of the ramp are one pair.
    "yarn_without_ramp": ("llama", {"rope_parameters": YARN | {"beta_fast": 1, "beta_slow": 1}}),
    "partial": ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    ),
}
REAL = (
    "DeepSeek-R1-0528-Qwen3-8B",
    "Llama-3.1-70B-Instruct",
    "Phi-4-mini-reasoning",
    "Qwen3-32B",
)


def folder_of(name: str, root: Path) -> Path:
    """A folder with the configuration ``name``, and nothing else."""
    folder = root / name
    folder.mkdir()
    if name in REAL:
        (folder / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
    else:
        family, fields = TINY[name]
        config = tiny_config(family, **fields)
        config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
        config.save_pretrained(folder)
    return folder


def read(name: str, root: Path) -> tuple[Architecture, Any]:
    folder = folder_of(name, root)
    return read_architecture(HFFolder(folder)), AutoConfig.from_pretrained(folder)


def frequencies(architecture: Architecture, max_sequence_length: int) -> Tensor:
    return inverse_frequencies(
        architecture.rope,
        head_dim=architecture.head_dim,
        max_sequence_length=max_sequence_length,
    )


@pytest.mark.parametrize("longer", [0, 1])
@pytest.mark.parametrize("name", [*TINY, *REAL])
def test_frequencies_are_transformers_own(tmp_path: Path, name: str, longer: int) -> None:
    """Runs that allow sequences as long as the original length, and longer by one token."""
    architecture, hf_config = read(name, tmp_path)
    rope = architecture.rope
    length = (rope.original_max_position_embeddings or 64) + longer
    found = frequencies(architecture, length)

    of_phi3 = hf_config.model_type == "phi3"
    module = (Phi3RotaryEmbedding if of_phi3 else LlamaRotaryEmbedding)(hf_config)
    module(torch.zeros(1), torch.tensor([[length - 1]]))  # sets a long sequence's frequencies
    torch.testing.assert_close(found, module.inv_freq, rtol=1e-6, atol=0)
    assert rope.attention_factor == module.attention_scaling
    if rope.rope_type in ROPE_INIT_FUNCTIONS:
        expected, factor = ROPE_INIT_FUNCTIONS[rope.rope_type](hf_config, None, seq_len=length)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert rope.attention_factor == factor
    assert found.dtype == torch.float32


def test_a_dynamic_rotation_ends_where_it_changes(tmp_path: Path) -> None:
    """One token more, and transformers has other frequencies: runs are not that long."""
    architecture, hf_config = read("dynamic", tmp_path)
    assert architecture.max_position_embeddings == 65
    assert architecture.length_field.startswith("max_position_embeddings, past which rope_type 'd")
    module = LlamaRotaryEmbedding(hf_config)
    module(torch.zeros(1), torch.tensor([[65]]))
    found = frequencies(architecture, 65)
    assert not torch.allclose(found, module.inv_freq, rtol=1e-3)


def test_llama3_by_its_formula(tmp_path: Path) -> None:
    architecture, _ = read("llama3", tmp_path)
    found = frequencies(architecture, 64)
    plain = 5e5 ** (-torch.arange(0, 64, 2) / 64)
    assert not torch.allclose(found, plain, rtol=0.1)
    # The slowest turn 1 / factor as fast, the fastest as without.
    ends = plain[[0, -1]] / torch.tensor([1.0, 32.0])
    torch.testing.assert_close(found[[0, -1]], ends, rtol=1e-5, atol=0)


def test_yarn_by_its_formula(tmp_path: Path) -> None:
    """DeepSeek-R1-0528-Qwen3-8B: 4 times as long, sines and cosines 0.1 ln 4 larger."""
    architecture, _ = read("DeepSeek-R1-0528-Qwen3-8B", tmp_path)
    assert architecture.rope.attention_factor == pytest.approx(1.1386294361119891)
    plain = 1e6 ** (-torch.arange(64) / 64)
    found = plain / frequencies(architecture, 64)
    # Pair i turns 32768 plain[i] / 2 pi times: 32 times between pairs 23 and 24, once at 39.6.
    torch.testing.assert_close(found[:24], torch.ones(24), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[40:], torch.full((24,), 4.0), rtol=1e-5, atol=0)
    # Between them the part that is divided grows evenly, from pair 23 to pair 40.
    divided = (found[24:40].reciprocal() - 1) / (1 / 4 - 1)
    torch.testing.assert_close(divided, torch.arange(1, 17) / 17, rtol=1e-4, atol=0)


def test_phi_4_mini_by_its_formula(tmp_path: Path) -> None:
    """96 of 128 dimensions rotate; the factor is sqrt(1 + log 32 / log 4096)."""
    architecture, _ = read("Phi-4-mini-reasoning", tmp_path)
    assert architecture.rope.attention_factor == pytest.approx((17 / 12) ** 0.5)
    plain = 1e4 ** (-torch.arange(48) / 48)
    torch.testing.assert_close(frequencies(architecture, 4096), plain, rtol=1e-5, atol=0)
    long = frequencies(architecture, 4097)
    factors = json.loads((CONFIGS / "Phi-4-mini-reasoning.json").read_text())["rope_scaling"]
    slower = plain / torch.tensor(factors["long_factor"])
    torch.testing.assert_close(long, slower, rtol=1e-5, atol=0)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1902380714238083, 2.8284271247461903])
def test_megatrons_attention_multiplies_by_the_factor(factor: float) -> None:
    config = RotaryTransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, yarn_mscale=factor - 1
    )
    found = _yarn_get_concentration_factor_from_config(config)
    assert found == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "is_fused"),
    [("Qwen3-32B", True), ("DeepSeek-R1-0528-Qwen3-8B", False), ("longrope", False)],
)
def test_a_rotation_with_a_factor_is_not_fused(tmp_path: Path, name: str, is_fused: bool) -> None:
    architecture, _ = read(name, tmp_path)
    assert has_fused_rotation(architecture) == is_fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_transformers_own(tmp_path: Path, dtype: torch.dtype) -> None:
    """Megatron's rotation, given our frequencies and factor, in bf16 as well."""
    architecture, hf_config = read("longrope", tmp_path)
    rope, length, heads = architecture.rope, 70, 4
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(length, 1, heads, architecture.head_dim, generator=generator).to(dtype)
    angles = torch.outer(torch.arange(length), frequencies(architecture, length))
    found = _apply_rotary_pos_emb_bshd(
        query, torch.cat([angles, angles], dim=-1)[:, None, None], mscale=rope.attention_factor
    )
    cos_sin = Phi3RotaryEmbedding(hf_config)(query, torch.arange(length)[None])
    # [s, b, heads, dim] <--> [b, heads, s, dim]
    rotated, _ = apply_rotary_pos_emb(
        query.permute(1, 2, 0, 3), query.permute(1, 2, 0, 3), *cos_sin
    )
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    assert_close_relative(found, rotated.permute(2, 0, 1, 3), tolerance)
    assert torch.equal(found[..., 6:], query[..., 6:])
    assert not torch.equal(found[..., :6], query[..., :6])
