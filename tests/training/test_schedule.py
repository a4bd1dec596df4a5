"""The learning rate of every step, by the formula of every style; steps that teach nothing."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks

STEPS, WARMUP, LENGTH = 7, 2, 5  # the last two are past the end of the decay
PEAK, END = 1e-3, 1e-4
COMMON = [
    f"train_iters={STEPS}", f"optimizer.lr_decay_iters={LENGTH}", f"optimizer.lr={PEAK}",
    f"optimizer.lr_warmup_fraction={WARMUP / LENGTH}", "checkpoint.save_interval=null",
]  # fmt: skip
STYLES = ("constant", "linear", "cosine")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("schedule")
    pair = save_pair(root / "pair", "llama")
    cases: list[dict[str, Any]] = [
        {
            "name": style,
            "pair": str(pair),
            "overrides": [*COMMON, f"optimizer.lr_decay_style={style}", f"optimizer.min_lr={END}"],
        }
        for style in STYLES
    ]
    nothing = [
        "train_iters=3", "teacher_prompt.tokenizer=own", "optimizer.weight_decay=0.5",
        "optimizer.lr=0.1", "checkpoint.save_interval=null",
        # The ends of the prompts, which predict the first tokens, are always a pair.
        "taps.alignment=token",
    ]  # fmt: skip
    cases.append({"name": "nothing", "pair": str(pair), "overrides": nothing, "no_pairs": True})
    run_ranks("loop", cases, 1, root)
    return root


def records(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


def rate(step: int, style: str) -> float:
    """The learning rate of the update of a step, counted from 0."""
    if step <= WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    if style == "constant":
        return PEAK
    done = min((step - WARMUP) / (LENGTH - WARMUP), 1.0)
    left = 1 - done if style == "linear" else (1 + math.cos(math.pi * done)) / 2
    return END + (PEAK - END) * left


@pytest.mark.parametrize("style", STYLES)
def test_learning_rates(root: Path, style: str) -> None:
    found = [record["lr"] for record in records(root, style)]
    assert found == pytest.approx([rate(step, style) for step in range(STEPS)], rel=1e-9)


def test_a_step_without_anything_to_learn_is_counted_and_changes_nothing(root: Path) -> None:
    """An update would be weight decay alone."""
    found = records(root, "nothing")
    assert [record["unsupervised_steps"] for record in found] == [1, 2, 3]
    for record in found:
        assert record["loss"] is None
        assert record["cosine"] is None
        assert set(record["cosine_per_layer"].values()) == {None}
        assert record["lr"] == found[0]["lr"]
    before = load_file(root / "pair" / "student" / "model.safetensors")
    after = load_file(root / "nothing" / "student" / "model.safetensors")
    assert all(tensor.equal(before[name]) for name, tensor in after.items())
