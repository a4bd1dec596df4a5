import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture, Rope
from megatron_oprd.models.build import _inverse_frequencies
from megatron_oprd.models.families import read_architecture
from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.tiny import copy_with_config, save_tiny_model, tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Configurations as transformers 4 wrote them, field for field.
LLAMA_4 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008], "head_dim": 16,
    "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 80,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 6, "num_hidden_layers": 5, "num_key_value_heads": 2,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0",
    "use_cache": True, "vocab_size": 1001,
}  # fmt: skip
SMOLLM2_4 = LLAMA_4 | {
    "is_llama_config": True, "pad_token_id": 2, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}  # fmt: skip
QWEN2_4 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02,
    "intermediate_size": 80, "max_position_embeddings": 4096, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 6, "num_hidden_layers": 5,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 1001,
}  # fmt: skip
QWEN3_4 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 32, "hidden_act": "silu",
    "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 80,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 6, "num_hidden_layers": 5, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 1001,
}  # fmt: skip
COMMON: dict[str, Any] = {
    "num_layers": 5, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 6,
    "num_query_groups": 2, "vocab_size": 1001,
}  # fmt: skip
LLAMA3_ROPE = Rope(
    theta=5e5,
    rope_type="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
WRITTEN_BY_4: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        LLAMA_4,
        {"family": "LlamaForCausalLM", "head_dim": 16, "layernorm_epsilon": 1e-5, "tied": True,
         "rope": LLAMA3_ROPE, "qkv_bias": False, "qk_norm": False,
         "max_position_embeddings": 131072},
    ),
    "smollm2": (
        SMOLLM2_4,
        {"family": "LlamaForCausalLM", "head_dim": 16, "layernorm_epsilon": 1e-5, "tied": True,
         "rope": Rope(theta=1e5), "qkv_bias": False, "qk_norm": False,
         "max_position_embeddings": 131072},
    ),
    "qwen2": (
        QWEN2_4,
        {"family": "Qwen2ForCausalLM", "head_dim": 8, "layernorm_epsilon": 1e-6, "tied": False,
         "rope": Rope(theta=1e4), "qkv_bias": True, "qk_norm": False,
         "max_position_embeddings": 4096},
    ),
    "qwen3": (
        QWEN3_4,
        {"family": "Qwen3ForCausalLM", "head_dim": 32, "layernorm_epsilon": 1e-6, "tied": True,
         "rope": Rope(theta=1e6), "qkv_bias": False, "qk_norm": True,
         "max_position_embeddings": 40960},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family, as the installed transformers writes them."""
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "qwen2", "qwen3"):
        save_tiny_model(root / family, tiny_config(family), seed=0)
    return root


def read(models: Path, tmp_path: Path, family: str, **changes: Any) -> Architecture:
    folder = copy_with_config(models / family, tmp_path / "changed", **changes)
    return read_architecture(HFCheckpoint(folder))


@pytest.mark.parametrize("name", WRITTEN_BY_4)
def test_configurations_of_transformers_4(models: Path, tmp_path: Path, name: str) -> None:
    config, expected = WRITTEN_BY_4[name]
    everything = list(json.loads((models / "llama" / "config.json").read_text()))
    folder = copy_with_config(models / "llama", tmp_path / name, drop=everything)
    (folder / "config.json").write_text(json.dumps(config))
    assert read_architecture(HFCheckpoint(folder)) == Architecture(**COMMON, **expected)


@pytest.mark.parametrize("name", WRITTEN_BY_4)
def test_configurations_of_transformers_5(models: Path, tmp_path: Path, name: str) -> None:
    """The same configuration, read and written again by the installed transformers."""
    config, expected = WRITTEN_BY_4[name]
    folder = copy_with_config(models / "llama", tmp_path / name)
    (folder / "config.json").write_text(json.dumps(config))
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in written
    assert "rope_theta" not in written
    assert read_architecture(HFCheckpoint(folder)) == Architecture(**COMMON, **expected)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"attention_dropout": 0.1}),
        ("llama", {"rope_interleaved": True}),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}),
        ("llama", {"final_logit_softcapping": 30.0}),
        ("llama", {"qk_norm": False}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"sliding_window": 8}),
        ("qwen2", {"hidden_act": "relu"}),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen2", {"use_mrope": True}),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("qwen2", {"attention_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"use_sliding_window": True}),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}),
        ("qwen3", {"mlp_bias": False}),
        ("qwen3", {"model_type": "mistral"}),
        ("qwen3", {"num_key_value_heads": 3}),
        ("llama", {"hidden_size": "wide"}),
        ("llama", {"architectures": ["MistralForCausalLM"]}),
        ("llama", {"architectures": ["LlamaForCausalLM", "LlamaModel"]}),
        ("llama", {"architectures": None}),
    ],
)
def test_a_refused_field_is_named(
    models: Path, tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    ((field, _),) = fields.items()
    with pytest.raises(UserError, match=rf"changed/config\.json: .*{field}") as error:
        read(models, tmp_path, family, **fields)
    assert "\n" not in str(error.value)


ROPES: list[tuple[dict[str, Any], str]] = [
    ({"rope_type": "linear", "factor": 2.0}, "rope_type 'linear' is not supported"),
    ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not supported"),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "rope_type 'yarn' is not supported",
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
    ({"rope_type": "default", "factor": 2.0}, r"'default' takes \[\], found \['factor'\]"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor other than"),
    ({"rope_type": "llama3", "factor": 8.0}, "rope_type.*llama3"),
    (LLAMA3 | {"attention_factor": 2.0}, "'llama3' takes .* found .*attention_factor"),
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
        read_architecture(HFCheckpoint(folder))


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
    assert found.rope == LLAMA3_ROPE


def test_llama3_frequencies_are_transformers_own(models: Path, tmp_path: Path) -> None:
    read(models, tmp_path, "llama", head_dim=64, rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    folder = tmp_path / "changed"
    expected = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq
    found = _inverse_frequencies(read_architecture(HFCheckpoint(folder)))
    assert torch.equal(found, expected)
    assert found.shape == (32,)
    plain = 5e5 ** (-torch.arange(0, 64, 2) / 64)
    assert not torch.allclose(found, plain, rtol=0.1)
    # The slowest turn 1 / factor as fast, the fastest as without.
    torch.testing.assert_close(found[[0, -1]], plain[[0, -1]] / torch.tensor([1.0, 32.0]))
