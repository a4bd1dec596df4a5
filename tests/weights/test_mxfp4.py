"""MXFP4 weights are read as the values that they stand for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from checkpoint_tools.megatron_to_hf import main as megatron_to_hf
from checkpoint_tools.verify import main as verify
from megatron_oprd.errors import UserError
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.helpers.tiny import save_tiny_model, tiny_config

EXPERTS, HIDDEN, FFN = 8, 64, 32
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
UP = "model.layers.1.mlp.experts.gate_up_proj"
# The values of the 16 codes, in their order.
VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return mxfp4_folder(tmp_path / "model")


def mxfp4_folder(folder: Path, *, num_hidden_layers: int = 2) -> Path:
    """A tiny model as published: bf16, with codes and exponents in the place of the experts."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN}
    sizes["num_hidden_layers"] = num_hidden_layers
    save_tiny_model(folder, tiny_config("gpt_oss", **sizes), seed=0, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        shape = (experts, rows, columns // 32)
        stored[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator).byte()
        # From 2^-14 to 2^4, and of a few groups the largest and the smallest exponents.
        stored[f"{name}_scales"] = torch.randint(113, 132, shape, generator=generator).byte()
        stored[f"{name}_scales"][0, :3, 0] = torch.tensor([0, 1, 250]).byte()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": CONFIG}
    # Published configurations name no dtype.
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_values_are_those_of_transformers(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    opened = open_checkpoint(folder)
    opened.check_tensors()
    for name, tensor in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")):
            assert torch.equal(opened.source.read(name), tensor), name
            continue
        for expert, one in enumerate(tensor):
            found = opened.source.read(f"{name}[{expert}]")
            assert found.dtype == torch.bfloat16
            # Gate rows and then up rows, which take turns in transformers.
            expected = [one[..., 0::2], one[..., 1::2]] if "gate_up" in name else [one]
            assert torch.equal(
                found,
                torch.cat([part.mT for part in expected])
                if one.dim() == 2
                else torch.cat(expected),
            ), name


def test_values_by_hand(folder: Path) -> None:
    codes = load_file(folder / "model.safetensors")
    blocks, scales = codes[f"{UP}_blocks"], codes[f"{UP}_scales"]
    found = open_checkpoint(folder).source.read(f"{UP}[3]")
    for row, column in ((0, 0), (5, 33), (FFN + 7, 62)):
        stored = 2 * row if row < FFN else 2 * (row - FFN) + 1
        group, place = divmod(column, 32)
        byte = int(blocks[3, stored, group, place // 2])
        code = byte >> 4 if place % 2 else byte & 15
        assert float(found[row, column]) == VALUES[code] * 2.0 ** (
            int(scales[3, stored, group]) - 127
        )


def test_one_expert_is_read_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = open_checkpoint(folder).source, []
    inner = HFCheckpoint.read_slice

    def counted(self: HFCheckpoint, name: str, *slices: slice, out: Tensor | None = None) -> Tensor:
        found = inner(self, name, *slices, out=out)
        read.append((name, tuple(found.shape)))
        return found

    monkeypatch.setattr(HFCheckpoint, "read_slice", counted)
    whole = source.read(f"{UP}[2]")
    # Once, whatever part of it is asked for.
    assert torch.equal(source.read_slice(f"{UP}[2]", slice(3, 40), slice(5, 9)), whole[3:40, 5:9])
    assert read == [(f"{UP}_blocks", (1, 2 * FFN, 2, 16)), (f"{UP}_scales", (1, 2 * FFN, 2))]


def test_through_megatron_and_back(folder: Path, tmp_path: Path) -> None:
    """The way back gives bf16 weights, stacked as transformers writes them."""
    hf_to_megatron(folder, tmp_path / "megatron", Settings())
    back = tmp_path / "back"
    assert megatron_to_hf(["--megatron", str(tmp_path / "megatron"), "--out", str(back)]) == 0
    exported = load_file(back / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    ).state_dict()
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    assert verify([str(folder), str(back), "--level", "bitwise"]) == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{UP}_scales"), "gate_up_proj_blocks has no .*gate_up_proj_scales"),
        (lambda t: t.pop(f"{UP}_blocks"), "gate_up_proj_scales has no .*gate_up_proj_blocks"),
        (
            lambda t: t.update({f"{UP}_scales": torch.zeros(8, 64, 3).byte()}),
            r"shape \[8, 64, 2, 16\] and .*scales \[8, 64, 3\]",
        ),
        (
            lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"].float()}),
            r"is torch\.float32; codes and scales of MXFP4 are uint8",
        ),
    ],
)
def test_refused_by_the_tensors(
    folder: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    change(folder, edit)
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder)
