"""FP8 weights with scales are read as the values that they stand for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from checkpoint_tools.megatron_to_hf import main as megatron_to_hf
from checkpoint_tools.verify import main as verify
from megatron_oprd.errors import UserError
from megatron_oprd.models.families import read_architecture
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.weights.hf_files import HFCheckpoint, HFFolder
from tests.helpers.tiny import copy_with_config, save_tiny_model, tiny_config, with_vision

FP8 = torch.float8_e4m3fn
LINEAR = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),  # DeepSeek's
)
UP = "model.layers.1.mlp.up_proj.weight"  # [64, 32]


def fp8(block: list[int] | None, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"} | {
        "weight_block_size": block,
        "modules_to_not_convert": ["lm_head"],
        **fields,
    }


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    of_weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    activations = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    group = {
        "targets": ["Linear"],
        "weights": of_weights | {"strategy": strategy, "group_size": None} | weights,
        "input_activations": activations,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
    }


# Name: (configuration, suffix of scales, rows and columns with one scale; None: all of them).
FORMS: dict[str, tuple[dict[str, Any], str, tuple[int | None, int | None]]] = {
    "blocks": (fp8([16, 16]), "_scale_inv", (16, 16)),
    # Of 64 or 32 rows and columns the last blocks have fewer.
    "ragged_blocks": (fp8([24, 20]), "_scale_inv", (24, 20)),
    "one_scale": (fp8(None, activation_scheme="static"), "_scale_inv", (None, None)),
    "compressed_rows": (compressed("channel"), "_scale", (1, None)),
    "compressed_one_scale": (compressed("tensor"), "_scale", (None, None)),
    "compressed_blocks": (compressed("block", block_structure=[16, 16]), "_scale", (16, 16)),
}


def spread(scales: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """The scale of every element."""
    rows = scales.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def quantise(
    folder: Path, form: str, dtype: torch.dtype, *, scale_dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Replaces a folder's weights by codes and scales; returns the values they stand for."""
    config, suffix, (height, width) = FORMS[form]
    stored, values = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = values[name] = tensor.to(dtype)
        if not name.removesuffix(".weight").endswith(LINEAR) or "language_model" in name:
            continue
        block = height or tensor.shape[0], width or tensor.shape[1]
        grid = [-(-size // of_block) for size, of_block in zip(tensor.shape, block, strict=True)]
        generator = torch.Generator().manual_seed(len(stored))
        scales = (0.001 + 0.003 * torch.rand(grid, generator=generator)).to(scale_dtype)
        whole = spread(scales.float(), tensor.shape, block)
        stored[name] = (tensor / whole).clamp(-448, 448).to(FP8)
        # As in files: one scale is no matrix.
        stored[name + suffix] = scales.reshape(()) if form == "one_scale" else scales
        if form == "one_scale":
            stored[name.replace(".weight", ".activation_scale")] = torch.tensor(0.5)
        values[name] = (stored[name].float() * whole).to(dtype)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    named = str(dtype).removeprefix("torch.")
    written |= {"quantization_config": config, "dtype": named}
    (folder / "config.json").write_text(json.dumps(written))
    return values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model", tiny_config("qwen3"), seed=0)
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_values(folder: Path, form: str, dtype: torch.dtype) -> None:
    """Whole, by rows, by columns, and into memory that is there."""
    expected = quantise(folder, form, dtype)
    opened = open_checkpoint(folder)
    opened.check_tensors()
    source = opened.source
    assert sorted(source.names()) == sorted(expected)
    assert source.num_bytes() == sum(tensor.nbytes for tensor in expected.values())
    for name, tensor in expected.items():
        assert source.dtype(name) == dtype
        assert torch.equal(source.read(name), tensor), name
    assert torch.equal(source.read_slice(UP, slice(13, 50)), expected[UP][13:50])
    out = torch.empty(37, 12, dtype=dtype)
    source.read_slice(UP, slice(13, 50), slice(15, 27), out=out)
    assert torch.equal(out, expected[UP][13:50, 15:27])
    assert "quantization_config" not in source.config
    assert "quantization_config" not in HFFolder(source.hf_folder).config


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_transformers(folder: Path, scale_dtype: torch.dtype) -> None:
    quantise(folder, "blocks", torch.bfloat16, scale_dtype=scale_dtype)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    source = open_checkpoint(folder).source
    weights = model.state_dict()
    assert weights.keys() == set(source.names())
    for name, tensor in weights.items():
        assert torch.equal(source.read(name), tensor), name


def test_only_the_slice_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantise(folder, "blocks", torch.bfloat16)
    source, read = open_checkpoint(folder).source, []
    inner = HFCheckpoint.read_slice

    def counted(self: HFCheckpoint, name: str, *slices: slice, out: Tensor | None = None) -> Tensor:
        found = inner(self, name, *slices, out=out)
        read.append((name, tuple(found.shape)))
        return found

    monkeypatch.setattr(HFCheckpoint, "read_slice", counted)
    source.read_slice(UP, slice(3, 7), slice(0, 9))
    assert read == [(UP, (4, 9)), (f"{UP}_scale_inv", (4, 2))]


def test_through_megatron_and_back(folder: Path, tmp_path: Path) -> None:
    expected = quantise(folder, "ragged_blocks", torch.bfloat16)
    hf_to_megatron(folder, tmp_path / "megatron", Settings())
    back = tmp_path / "back"
    assert megatron_to_hf(["--megatron", str(tmp_path / "megatron"), "--out", str(back)]) == 0
    exported = load_file(back / "model.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    assert verify([str(folder), str(back), "--level", "bitwise"]) == 0


def test_mixture_of_experts(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "moe", tiny_config("qwen3_moe"), seed=0)
    expected = quantise(tmp_path / "moe", "blocks", torch.bfloat16)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    opened = open_checkpoint(tmp_path / "moe")
    opened.check_tensors()
    assert torch.equal(opened.source.read(name), expected[name])


def test_deepseek_v3_as_published(tmp_path: Path) -> None:
    """Blocks at the edges of odd matrices, and a layer that predicts further tokens."""
    folder = tmp_path / "model"
    save_tiny_model(folder, tiny_config("deepseek_v3"), seed=0)
    expected = quantise(folder, "ragged_blocks", torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.4.self_attn.q_a_proj.weight"
    first = "model.layers.0.self_attn.q_a_proj.weight"
    for suffix in ("", "_scale_inv"):
        tensors[name + suffix] = tensors[first + suffix].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    published = copy_with_config(folder, tmp_path / "published", num_nextn_predict_layers=1)
    opened = open_checkpoint(published)
    opened.check_tensors()
    assert sorted(opened.source.names()) == sorted(expected)
    read = {one: opened.source.read(one) for one in expected}
    assert all(torch.equal(read[one], tensor) for one, tensor in expected.items())
    in_fp8 = {
        one.rpartition(".")[0].rpartition(".")[2]
        for one in tensors
        if one + "_scale_inv" in tensors
    }
    assert in_fp8 == set(LINEAR) - {"q_proj", "k_proj", "v_proj"}


def test_the_decoder_of_a_model_with_images(tmp_path: Path) -> None:
    """Its configuration is beside that of the images' part, and so is the quantisation."""
    folder = tmp_path / "model"
    save_tiny_model(folder, with_vision(tiny_config("mistral")), seed=0)
    tensors = load_file(folder / "model.safetensors")
    name, scale = f"language_model.{UP}", torch.tensor(0.01)
    tensors[name] = (tensors[name] / scale).to(FP8)
    expected = tensors[name].float() * scale
    tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantised = copy_with_config(folder, tmp_path / "quantised", quantization_config=fp8(None))
    opened = open_checkpoint(quantised)
    opened.check_tensors()
    assert torch.equal(opened.source.read(UP), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method = 'awq'.*give the model's bf16 folder"),
        ({"quant_method": "gptq"}, "quant_method = 'gptq'.*or its FP8 one"),
        ({"quant_method": "mxfp4", "bits": 4}, "bits = 4, which is not known"),
        ({"quant_method": "other"}, "'other'.*the folder of the model that was quantised"),
        ({"bits": 4}, "quant_method = None"),
        (fp8([128, 128], scale_fmt="ue8m0"), r"scale_fmt = 'ue8m0', which is not one of \['float"),
        (fp8([128, 128], fmt="e5m2"), "fmt = 'e5m2'"),
        (fp8([128, 128], offsets=True), "offsets = True, which is not known"),
        (fp8([128]), r"weight_block_size = \[128\] has to be two sizes"),
        (compressed("channel") | {"format": "pack-quantized"}, "format = 'pack-quantized'"),
        (compressed("channel", num_bits=4), r"weights\.num_bits = 4"),
        (compressed("group"), r"weights\.strategy = 'group'"),
        (compressed("block"), "without a block_structure"),
        (compressed("channel") | {"config_groups": {}}, "has 0 sizes of blocks"),
        (compressed("channel") | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ],
)
def test_refused_by_the_configuration(
    folder: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    other = copy_with_config(folder, tmp_path / "other", quantization_config=config)
    for read in (lambda: read_architecture(HFFolder(other)), lambda: open_checkpoint(other)):
        with pytest.raises(UserError, match=message):
            read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{UP}_scale_inv": torch.ones(4, 3)}, r"shape \[4, 3\].* needs \[4, 2\] scales"),
        ({"model.norm.weight_scale_inv": torch.ones(1)}, "are the scales of no tensor in FP8"),
        ({UP: torch.ones(64, 32)}, "are the scales of no tensor in FP8"),
        ({UP: torch.ones(2, 64, 32).to(FP8)}, "one tensor for each expert"),
        ({f"{UP}_scale_inv": None}, f"{UP} is float8_e4m3fn; weights"),
    ],
)
def test_refused_by_the_tensors(
    folder: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    quantise(folder, "blocks", torch.bfloat16)
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder).check_tensors()


def test_another_dtype(folder: Path, tmp_path: Path) -> None:
    quantise(folder, "blocks", torch.bfloat16)
    other = copy_with_config(folder, tmp_path / "other", dtype="float64")
    with pytest.raises(UserError, match="dtype = 'float64'; quantised weights are read as float32"):
        open_checkpoint(other)
