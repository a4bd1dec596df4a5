"""Folders that are nearly a model's: what is not its weights is named, what is nothing passes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoint_tools.hf_to_megatron import main as hf_to_megatron
from checkpoint_tools.megatron_to_hf import main as megatron_to_hf
from checkpoint_tools.verify import main as verify
from megatron_oprd.errors import UserError
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.weights import accounting, load
from megatron_oprd.weights.casting import config_with_dtype
from megatron_oprd.weights.compare import compare_keys
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.megatron_checkpoint import is_megatron, resolve_checkpoint_folder
from tests.helpers.tiny import copy_with_config, save_tiny_model, tiny_config

pytestmark = pytest.mark.long

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model", tiny_config("llama"), seed=0)
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["adapter_config.json", "hf_quant_config.json"])
def test_what_says_that_the_weights_are_others(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(UserError, match=f"has {name}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.json", '{"license": "apache"}'),
        (".metadata", "x"),
        ("latest_checkpointed_iteration.txt", "junk"),
        ("mp_rank_00/x", "x"),
        ("step_0000100/metadata.json", '{"sharded_backend": "torch_dist"}'),
    ],
)
def test_a_file_does_not_make_a_megatron_checkpoint(folder: Path, name: str, content: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    assert not is_megatron(folder)
    open_checkpoint(folder).check_tensors()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool])
def test_quantised_weights_are_named(folder: Path, dtype: torch.dtype) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[UP] = weights[UP].to(dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{UP} is {str(dtype).removeprefix('torch.')}; weights"):
        open_checkpoint(folder).check_tensors()


def test_named_chat_templates_travel_and_are_compared(folder: Path, tmp_path: Path) -> None:
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("tools")
    (templates / "notes.txt").write_text("none")
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert hf_to_megatron(["--hf", str(folder), "--out", str(megatron)]) == 0
    assert megatron_to_hf(["--megatron", str(megatron), "--out", str(back)]) == 0
    assert [path.name for path in (back / templates.name).iterdir()] == ["tool_use.jinja"]
    assert verify([str(folder), str(back), "--level", "bitwise"]) == 0
    (back / templates.name / "tool_use.jinja").write_text("others")
    (difference,) = compare_keys(HFCheckpoint(folder), HFCheckpoint(back))
    assert (difference.kind, difference.name) == (
        "file",
        "additional_chat_templates/tool_use.jinja",
    )


def test_experts_fused_on_disk(tmp_path: Path) -> None:
    """Read as the single ones are: whole, by rows and by columns; and converted."""
    save_tiny_model(tmp_path / "single", tiny_config("qwen3_moe"), seed=0)
    weights = load_file(tmp_path / "single" / "model.safetensors")
    fused = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts"

        def stacked(part: str, prefix: str = prefix) -> torch.Tensor:
            return torch.stack([weights[f"{prefix}.{e}.{part}_proj.weight"] for e in range(8)])

        fused[f"{prefix}.gate_up_proj"] = torch.cat([stacked("gate"), stacked("up")], dim=1)
        fused[f"{prefix}.down_proj"] = stacked("down")
    shutil.copytree(tmp_path / "single", tmp_path / "fused")
    save_file(fused, tmp_path / "fused" / "model.safetensors", {"format": "pt"})
    opened = open_checkpoint(tmp_path / "fused")
    opened.check_tensors()
    source = opened.source
    assert sorted(source.names()) == sorted(weights)
    for name, tensor in weights.items():
        assert source.shape(name) == tensor.shape
        assert torch.equal(source.read(name), tensor), name
        rows = slice(1, len(tensor) - 1)
        assert torch.equal(source.read_slice(name, rows), tensor[rows]), name
        if tensor.dim() == 2:
            out = torch.empty(len(tensor) - 2, 5)
            source.read_slice(name, rows, slice(3, 8), out=out)
            assert torch.equal(out, tensor[rows, 3:8]), name
    for name in ("single", "fused"):
        arguments = ["--hf", str(tmp_path / name), "--out", str(tmp_path / f"{name}.megatron")]
        assert hf_to_megatron(arguments) == 0
    one, other = (str(tmp_path / f"{name}.megatron") for name in ("single", "fused"))
    assert verify([one, other, "--level", "bitwise"]) == 0


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """As many as the configuration says; others are no part of the model."""
    folder = tmp_path / "model"
    save_tiny_model(folder, tiny_config("glm4_moe"), seed=0)
    weights = load_file(folder / "model.safetensors")
    further = {f"model.layers.{layer}.enorm.weight": torch.ones(32) for layer in (4, 5)}
    save_file(weights | further, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"left over: model\.layers\.5\.enorm\.weight"):
        open_checkpoint(folder).check_tensors()
    both = copy_with_config(folder, tmp_path / "both", num_nextn_predict_layers=2)
    opened = open_checkpoint(both)
    opened.check_tensors()
    assert sorted(opened.source.names()) == sorted(weights)


def test_minimax_m2_says_how_many_predict_further_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_tiny_model(folder, tiny_config("minimax_m2"), seed=0)
    weights = load_file(folder / "model.safetensors")
    further = {f"model.layers.{layer}.enorm.weight": torch.ones(32) for layer in (4, 5)}
    save_file(weights | further, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"left over: model\.layers\.4\.enorm\.weight"):
        open_checkpoint(folder).check_tensors()
    both = copy_with_config(folder, tmp_path / "both", num_mtp_modules=2)
    opened = open_checkpoint(both)
    opened.check_tensors()
    assert sorted(opened.source.names()) == sorted(weights)


def test_qwen3_nexts_further_layer_has_a_name_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_tiny_model(folder, tiny_config("qwen3_next"), seed=0)
    weights = load_file(folder / "model.safetensors")
    further = {
        "mtp.layers.0.input_layernorm.weight": torch.ones(32),
        "mtp.norm.weight": torch.ones(32),
    }
    save_file(weights | further, folder / "model.safetensors", {"format": "pt"})
    opened = open_checkpoint(folder)
    opened.check_tensors()
    assert sorted(opened.source.names()) == sorted(weights)


@pytest.mark.parametrize("family", ["minimax_m2", "mixtral", "qwen2_moe"])
def test_experts_fused_by_transformers(tmp_path: Path, family: str) -> None:
    """Its own form has Mixtral's other names as well."""
    save_tiny_model(tmp_path / "single", tiny_config(family), seed=0)
    weights = load_file(tmp_path / "single" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert sorted(load_file(tmp_path / "fused" / "model.safetensors")) != sorted(weights)
    opened = open_checkpoint(tmp_path / "fused")
    opened.check_tensors()
    assert sorted(opened.source.names()) == sorted(weights)
    for name, tensor in weights.items():
        assert opened.source.dtype(name) == tensor.dtype
        assert torch.equal(opened.source.read(name), tensor), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "phi3"])
@pytest.mark.parametrize(
    "fields",
    [
        {"qkv_bias": False, "shared_expert_intermediate_size": 0},
        {"unsloth_fixed": True, "unsloth_version": "2026.1"},
        {"some_new_field": None, "quantization_config": None},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_length": 20},
        {"id2label": {"0": "a"}, "label2id": {"a": 0}, "return_dict": True},
        {"layer_types": ["full_attention"] * 4},
    ],
)
def test_fields_that_change_nothing(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    if family == "qwen2":
        fields = {name: value for name, value in fields.items() if name != "qkv_bias"}
    save_tiny_model(tmp_path / "model", tiny_config(family), seed=0)
    expected = open_checkpoint(tmp_path / "model").architecture
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    assert open_checkpoint(tmp_path / "model").architecture == expected


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("llama", {"qkv_bias": True}, "qkv_bias"),
        ("qwen2", {"qkv_bias": False}, "qkv_bias"),
        ("llama", {"use_qk_norm": True}, "use_qk_norm"),
        ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 24}, "shared_expert"),
        ("llama", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("llama", {"some_new_field": 1}, "some_new_field"),
        ("qwen3_moe", {"num_local_experts": None, "num_experts": 8}, "num_experts"),
    ],
)
def test_fields_that_change_numbers(
    tmp_path: Path, family: str, fields: dict[str, Any], named: str
) -> None:
    save_tiny_model(tmp_path / "model", tiny_config(family), seed=0)
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(UserError, match=named):
        open_checkpoint(tmp_path / "model")


def test_both_names_of_a_dtype_are_written() -> None:
    both = {"dtype": "float32", "torch_dtype": "float32"}
    assert config_with_dtype(both, torch.bfloat16) == dict.fromkeys(both, "bfloat16")
    assert config_with_dtype({}, torch.bfloat16) == {"dtype": "bfloat16"}
    assert config_with_dtype({"torch_dtype": "bfloat16"}, torch.bfloat16) is None


def test_the_newest_checkpoint_is_so_by_number(tmp_path: Path) -> None:
    for step in ("step_9999999", "step_10000000", "step_0000005"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    assert resolve_checkpoint_folder(tmp_path).name == "step_10000000"


def test_a_tied_head_is_compared_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "ROWS", 16)
    config = tiny_config("llama", tie_word_embeddings=True)
    save_tiny_model(tmp_path / "model", config, seed=0)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, file, {"format": "pt"})
    open_checkpoint(tmp_path / "model").check_tied_head()
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match="lm_head"):
        open_checkpoint(tmp_path / "model").check_tied_head()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    save_tiny_model(tmp_path / "model", tiny_config("llama"), seed=0)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights[UP][3, 2] = value
    save_file(weights, file, {"format": "pt"})
    opened = open_checkpoint(tmp_path / "model")
    (mapping,) = [one for one in opened.table if UP in one.hf]
    pieces = mapping.pieces(0, 1)
    with pytest.raises(UserError, match=f"model: 1 values of {UP} are NaN or infinite"):
        load.fill_parameter(
            torch.empty(mapping.local_shape(1)), pieces=pieces, checkpoint=opened.source
        )
