"""The benchmarks run to their tables, with models that are tiny, or nearly new-born."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_tokenizer

pytestmark = pytest.mark.slow

FOLDER = ROOT / "examples/benchmarks"
SMALL = ["--hidden-size", "96", "--tokens", "24", "--repeats", "1", "--threads", "1"]


def printed(name: str, *arguments: str) -> str:
    """What a benchmark prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_taps() -> None:
    found = printed("taps", "--layers", "2", *SMALL)
    assert "goal: at most +3%" in found
    assert "times the targets'" in found


def test_teacher_tokens(tmp_path: Path) -> None:
    """Fewer micro-batches and operations each time."""
    config = tiny_config("llama", max_position_embeddings=2048)
    save_tiny_model(tmp_path / "model", config, seed=0)
    tiny_tokenizer(config.vocab_size).save_pretrained(tmp_path / "model")
    found = printed("teacher_tokens", "--model", str(tmp_path / "model"), "--repeats", "1")
    rows = [list(map(float, line.split())) for line in found.splitlines()[-3:]]
    assert [row[0] for row in rows] == [1, 4, 16]
    assert rows[0][1] > rows[1][1] > rows[2][1] == 1
    assert rows[0][3] > rows[1][3] > rows[2][3]


def test_actor_update() -> None:
    found = printed("actor_update", *SMALL, "optimizer.gradient_accumulation_fusion=false")
    assert "top" in found


def test_conversion(tmp_path: Path) -> None:
    found = printed(
        "conversion", "--folder", str(tmp_path), "--gigabytes", "0.02", "--repeats", "1"
    )
    assert "cp" in found


def test_step(tmp_path: Path) -> None:
    """Each method's run, and the table with all of its columns."""
    for seed, name in enumerate(("student", "teacher")):
        config = tiny_config("llama", max_position_embeddings=2048)
        save_tiny_model(tmp_path / name, config, seed=seed)
        tiny_tokenizer(config.vocab_size).save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    found = printed(
        "step",
        *("--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")),
        *("--steps", "2", "--threads", "1", "--method", "OPRD", "--method", "reverse KL"),
        *("--out", str(out), "rollout.max_new_tokens=4"),
    )
    rows = [line.split("|")[1:-1] for line in found.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["method", "before", "OPRD", "reverse KL"]
    assert all(cell.strip() for row in rows[2:] for cell in row)
    assert json.loads((out / "steps.json").read_text()).keys() == {"OPRD", "reverse KL"}
