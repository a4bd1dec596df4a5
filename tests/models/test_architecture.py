"""Rotary settings as configurations write them."""

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture, Rope
from megatron_oprd.models.families import read_architecture
from megatron_oprd.weights.hf_files import HFFolder
from tests.helpers.tiny import copy_with_config, tiny_config

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family with a configuration only."""
    root = tmp_path_factory.mktemp("models")
    for family, name in (("llama", "Llama"), ("phi3", "Phi3"), ("qwen3", "Qwen3")):
        tiny_config(family, architectures=[f"{name}ForCausalLM"]).save_pretrained(root / family)
    return root


def read(models: Path, tmp_path: Path, family: str, **changes: Any) -> Architecture:
    folder = copy_with_config(models / family, tmp_path / "changed", **changes)
    return read_architecture(HFFolder(folder))


ROPES: list[tuple[dict[str, Any], str]] = [
    ({"rope_type": "linear", "factor": 2.0, "beta_fast": 4}, "'linear' has .*beta_fast"),
    (
        {"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0},
        r"'dynamic' has \['alpha', 'factor'\]; .* \['factor'\]",
    ),
    (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "extrapolation_factor": 2.0,
        },
        r"'yarn' has .*extrapolation_factor.* and may have \['attention_factor', 'beta_fast'",
    ),
    (
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        },
        "rope_type 'longrope' is not supported",
    ),
    ({"rope_type": "default", "factor": 2.0}, r"'default' has \['factor'\]; .* \[\]"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"rope_type": "llama3", "factor": 8.0}, "rope_type.*llama3"),
    (LLAMA3 | {"attention_factor": 2.0}, "'llama3' has .*attention_factor"),
]


@pytest.mark.parametrize(("rope", "message"), ROPES)
def test_refused_rope(models: Path, tmp_path: Path, rope: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        read(models, tmp_path, "llama", rope_parameters=rope | {"rope_theta": 1e4})
    old = rope.copy()
    old["type"] = old.pop("rope_type")
    folder = tmp_path / "old"
    copy_with_config(
        models / "llama", folder, drop=["rope_parameters"], rope_theta=1e4, rope_scaling=old
    )
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        read_architecture(HFFolder(folder))


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}
LONGROPES: list[tuple[dict[str, Any], str]] = [
    (LONGROPE | {"short_factor": [1.0] * 3}, "short_factor.* 4"),
    (LONGROPE | {"long_factor": [1.0] * 3}, "long_factor.* 4"),
    (LONGROPE | {"partial_rotary_factor": 0.75}, "short_factor.* 3"),
    (LONGROPE | {"short_mscale": 1.2}, "'longrope' has .*short_mscale"),
    (
        LONGROPE | {"factor": 32.0},
        "factor = 32.0 is not max_position_embeddings / original_max_position_embeddings = 4.0",
    ),
    (LLAMA3 | {"rope_theta": 1e4}, "llama3"),
    ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "linear"),
]


@pytest.mark.parametrize(("rope", "message"), LONGROPES)
def test_refused_rope_of_phi3(
    models: Path, tmp_path: Path, rope: dict[str, Any], message: str
) -> None:
    # max_position_embeddings is 256.
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        read(models, tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=64)


@pytest.mark.parametrize(
    ("fields", "attention_factor"),
    [
        ({}, (4 / 3) ** 0.5),  # sqrt(1 + log 4 / log 64)
        ({"factor": 4.0}, (4 / 3) ** 0.5),
        ({"attention_factor": 0.5}, 0.5),
        ({"attention_factor": 1, "factor": 32.0}, 1.0),  # then factor is not used
        ({"attention_factor": None, "factor": None}, (4 / 3) ** 0.5),
    ],
)
def test_longropes_attention_factor(
    models: Path, tmp_path: Path, fields: dict[str, Any], attention_factor: float
) -> None:
    found = read(
        models,
        tmp_path,
        "phi3",
        rope_parameters=LONGROPE | fields,
        original_max_position_embeddings=64,
    )
    assert found.rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
STRETCH = 0.1 * math.log(4) + 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"attention_factor": STRETCH}),
        # Transformers does not read this one, which DeepSeek-R1-0528-Qwen3-8B has.
        ({"attn_factor": 0.878}, {"attention_factor": STRETCH}),
        (
            {"attention_factor": 0.5, "mscale": 2.0, "mscale_all_dim": 1.0},
            {"attention_factor": 0.5},
        ),
        (
            {"mscale": 0.7, "mscale_all_dim": 1.4},
            {"attention_factor": (0.07 * math.log(4) + 1) / (0.14 * math.log(4) + 1)},
        ),
        ({"mscale": 0.7}, {"attention_factor": STRETCH}),
        ({"mscale": 0.7, "mscale_all_dim": 0.0}, {"attention_factor": STRETCH}),
        ({"factor": 1.0}, {"attention_factor": 1.0, "factor": 1.0}),
        (
            {"beta_fast": 16, "beta_slow": 2, "truncate": False},
            {"attention_factor": STRETCH, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        ),
    ],
)
def test_yarns_fields(
    models: Path, tmp_path: Path, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = read(models, tmp_path, "qwen3", rope_parameters=YARN | fields)
    defaults = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    assert found.rope == Rope(
        theta=1e4,
        **{name: YARN[name] for name in YARN if name != "rope_theta"} | defaults | expected,
    )


def test_yarns_original_length_is_the_models_if_there_is_none(models: Path, tmp_path: Path) -> None:
    """As in transformers; Qwen's model cards change max_position_embeddings as well."""
    rope = {name: YARN[name] for name in YARN if name != "original_max_position_embeddings"}
    found = read(models, tmp_path, "qwen3", rope_parameters=rope)
    assert found.rope.original_max_position_embeddings == 256


def test_a_model_that_was_not_extended_has_no_attention_factor(
    models: Path, tmp_path: Path
) -> None:
    found = read(
        models,
        tmp_path,
        "phi3",
        rope_parameters=LONGROPE,
        original_max_position_embeddings=256,
    )
    assert found.rope.attention_factor == 1.0


def test_rope_by_layer_type_is_refused(models: Path, tmp_path: Path) -> None:
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(UserError, match=r"config\.json: rope_parameters .* no rope_theta"):
        read(models, tmp_path, "qwen3", rope_parameters=rope)


@pytest.mark.parametrize("names", [("type",), ("type", "rope_type")])
def test_the_old_name_of_rope_type(models: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_type"}
    scaling |= dict.fromkeys(names, "llama3")
    found = read(
        models,
        tmp_path,
        "llama",
        drop=["rope_parameters"],
        rope_theta=500000.0,
        rope_scaling=scaling,
    )
    assert found.rope == Rope(theta=5e5, **LLAMA3)
