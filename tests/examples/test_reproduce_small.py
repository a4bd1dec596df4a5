"""examples/reproduce_small at its smallest, from nothing to the table.

It shows that everything runs and is counted rightly; four steps say nothing about the methods.
"""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).parents[2]
_EXAMPLE = _ROOT / "examples" / "reproduce_small"
_METHODS = ["oprd", "top1", "top16", "full", "top1_oprd"]


def _start(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(_EXAMPLE / script), *arguments],
        env=os.environ | {"COLUMNS": "140", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for one in value.values() for number in _numbers(one)]
    if isinstance(value, list):
        return [number for one in value for number in _numbers(one)]
    return [value] if isinstance(value, int | float) else []


def test_every_method_is_run_and_measured(tmp_path: Path) -> None:
    models, out = tmp_path / "models", tmp_path / "comparison"
    _start("pretrain.py", "--small", "--out", str(models))
    parts = [(models / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test")]
    assert not set(parts[0]) & set(parts[1])

    arguments = ("--small", "--jobs", "2", "--models", str(models), "--out", str(out))
    printed = _start("compare.py", *arguments)
    for name in ("OPRD-Vanilla", "OPD top-1", "OPD top-16", "OPD full", "top-1 + mu OPRD"):
        assert f"│ {name} " in printed
    results = json.loads((out / "results.json").read_text())
    assert [result["method"] for result in results["results"]] == _METHODS
    assert all(math.isfinite(number) for number in _numbers(results))
    assert (out / "curves.png").stat().st_size > 0

    first_lengths = set()
    for result in results["results"]:
        assert list(result["accuracy"]) == ["2", "4"]
        assert 0 < sum(result["seconds_by_part"].values()) <= result["seconds"]
        assert result["peak_memory_mb"] > results["start_memory_mb"] > 0
        metrics = _metrics(out / "runs" / f"{result['method']}_seed1")
        assert all(math.isfinite(record["loss"]) for record in metrics)
        # Which losses are on: the taps' cosine and the output-space loss are null without them.
        assert (metrics[0]["cosine"] is not None) == ("oprd" in result["method"])
        assert (metrics[0]["output_loss"] is not None) == (result["method"] != "oprd")
        first_lengths.add(metrics[0]["num_tokens"])
    assert len(first_lengths) == 1  # the same student on the same prompts


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("975=579", True),
        ("111=579", True),  # the working does not count
        ("975=5790", False),
        ("975=57", False),
        ("975579", False),
        ("579", False),
        ("=579", True),
        ("975=579=", False),
    ],
)
def test_the_answer_is_what_stands_behind_the_last_equals_sign(
    response: str, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(_EXAMPLE))
    task = importlib.import_module("task")
    problem = task.Problem(left=123, right=456)
    assert (problem.prompt, problem.response) == ("123+456:", "975=579")
    assert task.is_correct(response, problem.answer) == right
