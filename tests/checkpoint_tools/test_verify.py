"""verify sees what a converter can do wrong, at the lowest level that can see it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from checkpoint_tools.verify import main, random_tokens, read_tokens
from megatron_oprd.errors import UserError, run_entry_point
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import copy_with_config, save_tiny_model, tiny_config

HEADS, GROUPS = 4, 2
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
INPUT_NORM = "model.layers.1.input_layernorm.weight"
Weights = dict[str, Tensor]


def swapped_kv(weights: Weights) -> set[str]:
    k, v = f"{ATTENTION}.k_proj.weight", f"{ATTENTION}.v_proj.weight"
    weights[k], weights[v] = weights[v], weights[k]
    return {k, v}


def flat_qkv(weights: Weights) -> set[str]:
    """Megatron's rows, group by group, taken for all of q, then of k, then of v."""
    names = [f"{ATTENTION}.{part}_proj.weight" for part in "qkv"]
    by_group = [weights[name].chunk(GROUPS) for name in names]
    fused = torch.cat([part for group in zip(*by_group, strict=True) for part in group])
    sizes = [len(weights[name]) for name in names]
    weights |= dict(zip(names, map(torch.Tensor.clone, fused.split(sizes)), strict=True))
    return set(names)


def swapped_gate_up(weights: Weights) -> set[str]:
    gate, up = f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"
    weights[gate], weights[up] = weights[up], weights[gate]
    return {gate, up}


def permuted_experts(weights: Weights) -> set[str]:
    changed = set()
    for part in ("gate", "up", "down"):
        first, second = (f"{MLP}.experts.{expert}.{part}_proj.weight" for expert in (2, 5))
        weights[first], weights[second] = weights[second], weights[first]
        changed |= {first, second}
    return changed


def shifted_row(weights: Weights) -> set[str]:
    name = f"{ATTENTION}.o_proj.weight"
    weights[name][7:] = weights[name][6:-1].clone()
    return {name}


def unit_norm(weights: Weights) -> set[str]:
    weights[INPUT_NORM] = torch.ones_like(weights[INPUT_NORM])
    return {INPUT_NORM}


MUTATIONS: list[tuple[str, Callable[[Weights], set[str]]]] = [
    ("llama", swapped_kv),
    ("llama", flat_qkv),
    ("llama", swapped_gate_up),
    ("llama", shifted_row),
    ("llama", unit_norm),
    ("qwen3_moe", permuted_experts),
    ("qwen3_moe", flat_qkv),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, and their mutants with the names of what was done to them."""
    root = tmp_path_factory.mktemp("verify")
    for family in ("llama", "qwen3_moe"):
        save_tiny_model(root / family, tiny_config(family), seed=0)
    for family, mutation in MUTATIONS:
        weights = load_file(root / family / "model.safetensors")
        mutation(weights)
        mutant = shutil.copytree(root / family, root / f"{family}.{mutation.__name__}")
        save_file(weights, mutant / "model.safetensors", metadata={"format": "pt"})
    rope = {"rope_type": "default", "rope_theta": 20000.0}
    copy_with_config(root / "llama", root / "llama.rope_theta", rope_parameters=rope)
    return root


def verify(a: Path, b: Path, level: str, *more: str) -> tuple[int, dict[str, Any]]:
    report = b.parent / "report.json"
    code = main([str(a), str(b), "--level", level, "--report", str(report), *more])
    return code, json.loads(report.read_text())


@pytest.mark.parametrize("level", ["keys", "bitwise", "logits"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_model_equals_itself(folders: Path, family: str, level: str) -> None:
    code, report = verify(folders / family, folders / family, level)
    assert code == 0
    assert report["equal"] is True
    assert not report.get("keys")
    assert not report.get("values")


@pytest.mark.parametrize(("family", "mutation"), MUTATIONS)
def test_mutations(folders: Path, family: str, mutation: Callable[[Weights], set[str]]) -> None:
    changed = mutation(load_file(folders / family / "model.safetensors"))
    mutant = folders / f"{family}.{mutation.__name__}"
    code, report = verify(folders / family, mutant, "keys")
    assert (code, report["equal"]) == (0, True)

    code, report = verify(folders / family, mutant, "bitwise")
    assert (code, report["equal"], report["keys"]) == (1, False, [])
    assert {value["name"] for value in report["values"]} == changed

    code, report = verify(folders / family, mutant, "logits", "--random", "2", "--length", "16")
    assert (code, report["equal"]) == (1, False)
    assert report["first_over_tolerance"] == "layer 1"
    states = report["states"]
    places = [*(f"layer {layer}" for layer in range(4)), "final norm", "logits"]
    assert [state["place"] for state in states] == places
    assert states[0]["relative"] <= 1e-6
    assert min(state["relative"] for state in states[1:]) > 100 * 1e-4


def test_where_a_shifted_row_is(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = load_file(folders / "llama/model.safetensors")[f"{ATTENTION}.o_proj.weight"]
    _, report = verify(folders / "llama", folders / "llama.shifted_row", "bitwise")
    (value,) = report["values"]
    assert value["index"] == [7, 0]
    assert value["a"] == float(original[7, 0])
    assert value["b"] == float(original[6, 0])
    assert value["num_different"] == 32 * 25
    said = capsys.readouterr().out
    assert f"{ATTENTION}.o_proj.weight" in said
    assert "DIFFERENT at level bitwise: 1 differences of values" in said


def test_rope_theta(folders: Path) -> None:
    a, b = folders / "llama", folders / "llama.rope_theta"
    code, report = verify(a, b, "keys")
    assert code == 1
    assert [(one["kind"], one["name"]) for one in report["keys"]] == [("config", "rope_parameters")]
    code, report = verify(a, b, "logits")
    assert (code, report["first_over_tolerance"]) == (1, "layer 0")


def test_missing_norm(folders: Path, tmp_path: Path) -> None:
    mutant = shutil.copytree(folders / "llama", tmp_path / "mutant")
    weights = load_file(mutant / "model.safetensors")
    del weights[INPUT_NORM]
    save_file(weights, mutant / "model.safetensors", metadata={"format": "pt"})
    code, report = verify(folders / "llama", mutant, "keys")
    assert code == 1
    assert report["keys"] == [{"kind": "tensor", "name": INPUT_NORM, "a": "there", "b": None}]
    # transformers would make it up. What cannot be run is no difference of states.
    with pytest.raises(UserError, match=f"missing keys: {INPUT_NORM}"):
        verify(folders / "llama", mutant, "logits")


def test_lost_tokenizer(folders: Path, tmp_path: Path) -> None:
    mutant = shutil.copytree(folders / "llama", tmp_path / "mutant")
    (mutant / "tokenizer.json").unlink()
    code, report = verify(folders / "llama", mutant, "keys")
    assert (code, report["keys"][0]["name"]) == (1, "tokenizer.json")


def test_dtypes(folders: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "bf16", tiny_config("llama"), seed=0, dtype=torch.bfloat16)
    code, report = verify(folders / "llama", tmp_path / "bf16", "bitwise")
    assert code == 1
    assert {"dtype", "config"} == {one["kind"] for one in report["keys"]}
    assert report["values"]
    code, _ = verify(folders / "llama", tmp_path / "bf16", "bitwise", "--dtype", "bfloat16")
    assert code == 0
    code, report = verify(folders / "llama", tmp_path / "bf16", "logits", "--tolerance", "0.1")
    assert code == 0
    assert max(state["relative"] for state in report["states"]) > 1e-4


def test_nan_is_a_difference(folders: Path, tmp_path: Path) -> None:
    mutant = shutil.copytree(folders / "llama", tmp_path / "mutant")
    weights = load_file(mutant / "model.safetensors")
    weights[INPUT_NORM][3] = torch.nan
    save_file(weights, mutant / "model.safetensors", metadata={"format": "pt"})
    code, report = verify(folders / "llama", mutant, "logits")
    assert (code, report["first_over_tolerance"]) == (1, "layer 1")
    assert report["states"][1]["relative"] == "inf"  # JSON has no infinity
    assert verify(mutant, mutant, "bitwise")[0] == 0


def test_tokens(folders: Path, tmp_path: Path) -> None:
    for text in ("[[1, 2, 3], [4, 5]]", "[1, 2, 3]\n[4, 5]\n"):
        (tmp_path / "tokens").write_text(text)
        assert read_tokens(tmp_path / "tokens") == [[1, 2, 3], [4, 5]]
    (tmp_path / "tokens").write_text("[1, 2]")
    assert read_tokens(tmp_path / "tokens") == [[1, 2]]
    code, _ = verify(
        folders / "llama", folders / "llama", "logits", "--tokens", str(tmp_path / "tokens")
    )
    assert code == 0
    drawn = random_tokens(3, length=8, vocab_size=97, seed=1)
    assert drawn == random_tokens(3, length=8, vocab_size=97, seed=1)
    assert drawn != random_tokens(3, length=8, vocab_size=97, seed=2)
    assert all(len(one) == 8 and one[:2] == [0, 96] for one in drawn)
    assert random_tokens(1, length=1, vocab_size=97, seed=0) == [[0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1, 97]]", r"token ids from 1 to 97; .* 0 to 96"),
        ("[[-1, 5]]", r"token ids from -1 to 5; .* 0 to 96"),
        ('[["a"]]', r"must hold lists of token ids"),
        ("[[]]", r"must hold lists of token ids"),
        ("{}", r"must hold lists of token ids"),
        ("text", r"cannot be read as JSON"),
        (None, r"cannot be read as JSON: .*No such file"),
    ],
)
def test_wrong_tokens(folders: Path, tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "tokens"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        verify(folders / "llama", folders / "llama", "logits", "--tokens", str(file))


def test_other_architectures(folders: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "short", tiny_config("llama", num_hidden_layers=3), seed=0)
    with pytest.raises(UserError, match=r"the models have 4 and 3 layers"):
        verify(folders / "llama", tmp_path / "short", "logits")
    with pytest.raises(SystemExit) as exit_info:
        run_entry_point(lambda: main([str(folders / "llama"), str(tmp_path / "none")]))
    assert exit_info.value.code == 2


def test_longrope_takes_sequences_on_one_side(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = tiny_config(
        "phi3",
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
        original_max_position_embeddings=8,
    )
    save_tiny_model(tmp_path / "phi3", config, seed=0)
    (tmp_path / "tokens").write_text(json.dumps([[1] * 8, [1] * 9]))
    with pytest.raises(UserError, match=r"some sequences are longer than original_max_pos.* = 8"):
        verify(
            tmp_path / "phi3", tmp_path / "phi3", "logits",
            "--engine", "megatron", "--tokens", str(tmp_path / "tokens"),
        )  # fmt: skip


@pytest.fixture(scope="module")
def converted(folders: Path) -> Path:
    """The results of Megatron checkpoints on two ranks."""
    settings = Settings(make_vocab_size_divisible_by=8)
    for name in ("llama", "llama.flat_qkv", "qwen3_moe"):
        hf_to_megatron(folders / name, folders / "megatron" / name, settings)
    cases = []
    for name, a, b, *more in (
        ("pp", "llama", "megatron/llama", "--pipeline-model-parallel-size", "2"),
        ("tp", "llama", "megatron/llama", "--tensor-model-parallel-size", "2"),
        ("mutant", "llama", "megatron/llama.flat_qkv", "--pipeline-model-parallel-size", "2"),
        ("hf", "llama", "llama.flat_qkv", "--tensor-model-parallel-size", "2", "--engine",
         "megatron"),
        ("ep", "qwen3_moe", "megatron/qwen3_moe", "--expert-model-parallel-size", "2"),
        ("refused", "llama", "megatron/llama", "--pipeline-model-parallel-size", "3"),
    ):  # fmt: skip
        arguments = [str(folders / a), str(folders / b), "--level", "logits", *more]
        report = ["--report", str(folders / f"{name}.report.json")]
        cases.append({"name": name, "arguments": [*arguments, *report]})
    run_ranks("verify", cases, 2, folders)
    return folders


@pytest.mark.parametrize(
    ("name", "code", "first"),
    [
        ("pp", 0, None),
        ("tp", 0, None),
        ("mutant", 1, "layer 1"),
        ("hf", 1, "layer 1"),
        ("ep", 0, None),
    ],
)
def test_in_megatron(converted: Path, name: str, code: int, first: str | None) -> None:
    assert json.loads((converted / f"{name}.json").read_text())["code"] == code
    report = json.loads((converted / f"{name}.report.json").read_text())
    assert report["first_over_tolerance"] == first
    if name != "hf":
        assert report["states"][0]["relative"] < 1e-4


def test_a_layout_that_does_not_fit(converted: Path) -> None:
    result = json.loads((converted / "refused.json").read_text())
    assert result["code"] == 2
    assert "2 processes" in result["error"]


@pytest.mark.parametrize("level", ["keys", "bitwise"])
def test_files_of_both_formats(converted: Path, level: str) -> None:
    code, report = verify(converted / "llama", converted / "megatron/llama", level)
    assert (code, report["equal"]) == (0, True)
    mutant = converted / "megatron/llama.flat_qkv"
    code, report = verify(converted / "megatron/llama", mutant, level)
    assert code == (0 if level == "keys" else 1)
