import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_oprd.weights import compare
from megatron_oprd.weights.compare import (
    KeyDifference,
    ValueDifference,
    absolute_difference,
    compare_keys,
    compare_values,
)
from megatron_oprd.weights.hf_files import HFCheckpoint

CONFIG = {"model_type": "llama", "rope_theta": 1e4, "dtype": "float32"}


def tensors() -> dict[str, Tensor]:
    return {"x": torch.arange(12.0).reshape(4, 3), "y": torch.ones(5)}


def folder(path: Path, values: dict[str, Tensor], **config: Any) -> HFCheckpoint:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    (path / "tokenizer.json").write_text("{}")
    save_file(values, path / "model.safetensors")
    return HFCheckpoint(path)


def key(kind: Any, name: str, a: str | None, b: str | None) -> KeyDifference:
    return KeyDifference(kind=kind, name=name, a=a, b=b)


def test_equal_checkpoints(tmp_path: Path) -> None:
    values = tensors() | {"nan": torch.tensor([math.nan])}
    a = folder(tmp_path / "a", values, transformers_version="4.1")
    stored = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    b = folder(tmp_path / "b", values | stored, transformers_version="5.1", _name_or_path="/b")
    assert compare_keys(a, b) == []
    compared: list[int] = []
    assert compare_values(a, b, advance=compared.append) == []
    assert sum(compared) == a.num_bytes()


def test_differences_of_keys(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"x": torch.ones(4, 3), "y": torch.ones(5), "z": torch.ones(1)})
    b = folder(
        tmp_path / "b",
        {"x": torch.ones(3, 4), "y": torch.ones(5).bfloat16(), "w": torch.ones(1)},
        rope_theta=5e5,
        dtype="bfloat16",
    )
    (tmp_path / "b/tokenizer.json").unlink()
    (tmp_path / "a/merges.txt").write_text("ab")
    (tmp_path / "b/merges.txt").write_text("ba")
    of_dtypes = [
        key("dtype", "y", "float32", "bfloat16"),
        key("config", "dtype", '"float32"', '"bfloat16"'),
    ]
    others = [
        key("shape", "x", "[4, 3]", "[3, 4]"),
        key("tensor", "z", "there", None),
        key("tensor", "w", None, "there"),
        key("config", "rope_theta", "10000.0", "500000.0"),
        key("file", "tokenizer.json", "2 bytes", None),
        key("file", "merges.txt", "2 bytes, other content", "2 bytes, other content"),
    ]

    def in_any_order(found: list[KeyDifference]) -> list[tuple]:
        return sorted((one.kind, one.name, one.a, one.b) for one in found)

    assert in_any_order(compare_keys(a, b)) == in_any_order(of_dtypes + others)
    assert in_any_order(compare_keys(a, b, ignore_dtypes=True)) == in_any_order(others)


LLAMA3 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
# A config as transformers 4 writes it and as transformers 5 does.
SPELLINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"rope_theta": 1e4, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
    ),
    (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
    ),
    (
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
    ),
]
LAYERS = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}


def config_differences(path: Path, a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    of_both = []
    for name, config in (("a", a), ("b", b)):
        shutil.rmtree(path / name, ignore_errors=True)
        folder(path / name, tensors())
        (path / name / "config.json").write_text(json.dumps(LAYERS | config))
        of_both.append(HFCheckpoint(path / name))
    found = compare_keys(*of_both)
    assert {one.kind for one in found} <= {"config"}
    return {one.name for one in found}


@pytest.mark.parametrize(("four", "five"), SPELLINGS)
def test_spellings_of_rope(tmp_path: Path, four: dict[str, Any], five: dict[str, Any]) -> None:
    assert config_differences(tmp_path, four, five) == set()
    assert config_differences(tmp_path, five, four) == set()
    rope = five["rope_parameters"]
    for field in rope.keys() - {"rope_type"}:
        changed = {"rope_parameters": rope | {field: rope[field] * 2}}
        assert {"rope_theta", "rope_parameters"} <= config_differences(tmp_path, four, changed)
        assert config_differences(tmp_path, five, changed) == {"rope_parameters"}


def test_lost_fields_are_no_spelling(tmp_path: Path) -> None:
    """Even where the model's class has the same default."""
    four, five = SPELLINGS[0]
    assert config_differences(tmp_path, four, {}) == {"rope_theta", "rope_scaling"}
    assert config_differences(tmp_path, five, {}) == {"rope_parameters"}
    unknown = {"model_type": "none-such"}
    found = config_differences(tmp_path, four | unknown, five | unknown)
    assert found == {"rope_theta", "rope_scaling", "rope_parameters"}


def test_spellings_of_dtype(tmp_path: Path) -> None:
    old, new = {"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}
    assert config_differences(tmp_path, old, new) == set()
    assert config_differences(tmp_path, old, {"dtype": "float32"}) == {"dtype", "torch_dtype"}
    assert config_differences(tmp_path, old, {}) == {"torch_dtype"}


@pytest.mark.parametrize("rows_bytes", [2**26, 24, 1])
def test_where_values_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_bytes: int
) -> None:
    """In one piece, two rows at a time, and with less than a row's bytes."""
    monkeypatch.setattr(compare, "ROWS_BYTES", rows_bytes)
    changed = tensors()
    changed["x"][2, 1] += 0.5
    changed["x"][3, 2] = -11.0
    a, b = folder(tmp_path / "a", tensors()), folder(tmp_path / "b", changed)
    assert compare_values(a, b) == [
        ValueDifference(
            name="x", num_different=2, num_values=12, index=(2, 1), a=7.0, b=7.5, largest=22.0
        )
    ]


def test_scalars_and_signs(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"s": torch.tensor(0.0), "i": torch.tensor([1, 2])})
    b = folder(tmp_path / "b", {"s": torch.tensor(-0.0), "i": torch.tensor([1, 3])})
    by_name = {one.name: one for one in compare_values(a, b)}
    assert by_name["s"].index == ()
    assert by_name["s"].largest == 0.0
    assert by_name["i"].index == (1,)
    assert by_name["i"].largest == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    exact = torch.tensor([0.5, 1.0, 2.0])
    a = folder(tmp_path / "a", {"exact": exact, "rounded": torch.tensor([1.0, 1.01])})
    b = folder(
        tmp_path / "b",
        {"exact": exact.to(dtype), "rounded": torch.tensor([1.0, 1.01]).to(dtype)},
    )
    (difference,) = compare_values(a, b)
    assert (difference.name, difference.index) == ("rounded", (1,))
    assert compare_values(a, b, dtype=dtype) == []
    shutil.rmtree(tmp_path / "b")
    c = folder(tmp_path / "b", {"exact": (exact + 1).to(dtype), "rounded": torch.ones(2).to(dtype)})
    assert compare_values(a, c, dtype=dtype)[0].name == "exact"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1.0, 3.5, 2.5),
        (math.nan, math.nan, 0.0),
        (math.nan, 1.0, math.inf),
        (math.inf, math.inf, 0.0),
        (math.inf, -math.inf, math.inf),
        (math.inf, 1.0, math.inf),
    ],
)
def test_absolute_difference(a: float, b: float, expected: float) -> None:
    one, other = torch.tensor([0.0, a]), torch.tensor([0.25, b])
    assert absolute_difference(one, other).tolist() == [0.25, expected]
