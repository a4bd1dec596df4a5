"""The report on FP8 teachers: on tiny models against transformers, and the goals on a real one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from checkpoint_tools.hidden_states import transformers_states
from tests.helpers.ranks import ROOT, run_ranks
from tests.helpers.tiny import copy_with_config, save_tiny_model, tiny_config
from tests.models.test_fp8 import rounded

pytestmark = pytest.mark.slow

SMOLLM2 = ROOT / ".cache/smollm2/SmolLM2-135M-Instruct"
HELD_OUT = ROOT / "examples/data/math_heldout.jsonl"
needs_smollm2 = pytest.mark.skipif(
    not SMOLLM2.is_dir(), reason=f"no {SMOLLM2.name}: make demo fetches it"
)
PROMPTS = ["one plus two", "3*4?", "seven minus five is"]
RECIPES = ["per_channel", "per_channel_log"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the models and every case's report."""
    root = tmp_path_factory.mktemp("fidelity")
    fields = {"num_hidden_layers": 3, "hidden_size": 64}
    save_tiny_model(root / "tiny", tiny_config("llama", **fields), seed=0)
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))

    def case(name: str, **settings: Any) -> dict[str, Any]:
        return {
            "name": name,
            "folder": str(root / "tiny"),
            "prompts": str(prompts),
            "recipes": RECIPES,
            "tp": 1,
            "params_dtype": "fp32",
            "max_new_tokens": 0,
            "max_tokens": 30,
        } | settings

    one = [case("prompts"), case("continued", max_new_tokens=5, max_tokens=1000)]
    if SMOLLM2.is_dir():
        one.append(
            case(
                "smollm2",
                folder=str(SMOLLM2),
                prompts=str(HELD_OUT),
                recipes=["per_channel_log"],
                params_dtype="bf16",
                max_new_tokens=24,
                max_tokens=4096,
            )
        )
    run_ranks("fp8_fidelity", one, 1, root)
    run_ranks("fp8_fidelity", [case("tp2", tp=2)], 2, root)
    return root


def report(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / f"{name}.json").read_text())


def states(folder: Path, sequences: list[list[int]]) -> list[Tensor]:
    """transformers' hidden states of all positions, [positions, h], by layer."""
    found = transformers_states(folder, sequences, device=torch.device("cpu"))
    return [torch.cat(of_place).double() for of_place in (*found.layers, found.normed)]


def test_measures_are_those_of_transformers(root: Path) -> None:
    found = report(root, "prompts")
    tokenizer = AutoTokenizer.from_pretrained(root / "tiny")
    sequences = [tokenizer(text)["input_ids"] for text in PROMPTS]
    assert found["num_positions"] == sum(map(len, sequences))
    expected = states(root / "tiny", sequences)
    for recipe in found["recipes"]:
        copy = copy_with_config(root / "tiny", root / recipe["recipe"])
        tensors = {
            name: rounded(t, recipe["recipe"]) if name.endswith("_proj.weight") else t.clone()
            for name, t in load_file(copy / "model.safetensors").items()
        }
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        assert [place["place"] for place in recipe["places"]] == ["0", "1", "2", "final norm"]
        for place, a, b in zip(recipe["places"], states(copy, sequences), expected, strict=True):
            cosine = (a * b).sum(dim=1) / a.norm(dim=1) / b.norm(dim=1)
            error = (a - b).norm(dim=1) / b.norm(dim=1)
            assert 1 - place["cosine"] == pytest.approx(1 - float(cosine.mean()), rel=0.02)
            assert 1 - place["lowest_cosine"] == pytest.approx(1 - float(cosine.min()), rel=0.02)
            assert place["relative_error"] == pytest.approx(float(error.mean()), rel=0.01)


def test_bytes(root: Path) -> None:
    found = report(root, "prompts")
    linear = channels = others = 0
    for name, tensor in load_file(root / "tiny" / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            linear += tensor.numel()
            channels += tensor.shape[0]
        elif "embed" not in name and "lm_head" not in name:
            others += tensor.numel()
    others += 128 * 64  # the embedding's rows, padded; the teacher has no head
    assert found["bf16"] == {"linear": 2 * linear, "whole": 2 * (linear + others)}
    for recipe in found["recipes"]:
        assert recipe["weights"] == {
            "linear": linear + 4 * channels,
            "whole": linear + 4 * channels + 2 * others,
        }


def test_ranks_share_the_model(root: Path) -> None:
    one, two = report(root, "prompts"), report(root, "tp2")
    for of_one, of_two in zip(one["recipes"], two["recipes"], strict=True):
        for a, b in zip(of_one["places"], of_two["places"], strict=True):
            assert 1 - b["cosine"] == pytest.approx(1 - a["cosine"], rel=0.01)
            assert b["relative_error"] == pytest.approx(a["relative_error"], rel=1e-3)
    # Norms are on both ranks, and so are the scales of what is split by input channels.
    assert two["bf16"]["linear"] == one["bf16"]["linear"]
    assert one["bf16"]["whole"] < two["bf16"]["whole"] < 1.02 * one["bf16"]["whole"]


def test_continuations_are_compared(root: Path) -> None:
    found = report(root, "continued")
    assert found["num_sequences"] == len(PROMPTS)
    assert len(PROMPTS) <= found["num_positions"] <= 5 * len(PROMPTS)


@needs_smollm2
def test_goals_on_smollm2(root: Path) -> None:
    found = report(root, "smollm2")
    (recipe,) = found["recipes"]
    assert found["num_positions"] > 200
    assert recipe["weights"]["linear"] <= 0.52 * found["bf16"]["linear"]
    assert recipe["weights"]["whole"] <= 0.62 * found["bf16"]["whole"]
    assert len(recipe["places"]) == 31
    for place in recipe["places"]:
        assert place["cosine"] >= 0.999, place


def test_entry_point(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "fp8.json"

    arguments = [
        *("--teacher", str(root / "tiny"), "--prompts", str(root / "prompts.jsonl")),
        *("--recipe", *RECIPES, "--params-dtype", "fp32", "--max-new-tokens", "4"),
        *("--output", str(output)),
    ]
    case = {"program": "examples.fp8_report.report", "arguments": arguments, "columns": 100}
    run_ranks("entry_point", [case], 1, tmp_path)
    shown = (tmp_path / "rank_0_of_1.log").read_text()
    rows = [line.split("│") for line in shown.splitlines() if "│ per_channel" in line]
    assert [row[1].strip() for row in rows] == RECIPES
    written = json.loads(output.read_text())
    share = written["recipes"][0]["weights"]["whole"] / written["bf16"]["whole"]
    assert rows[0][5].strip() == f"{share:.1%}"
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
