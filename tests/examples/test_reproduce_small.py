"""examples/reproduce_small at its smallest, from nothing to the tables.

The tests show that everything runs and is counted rightly; four steps say nothing about methods.
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
import torch
import yaml
from transformers import LlamaForCausalLM

from megatron_oprd.config.load import load_config

slow = pytest.mark.slow

_ROOT = Path(__file__).parents[2]
_EXAMPLE = _ROOT / "examples" / "reproduce_small"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the example's modules importable."""
    monkeypatch.syspath_prepend(str(_EXAMPLE))


def _run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(_EXAMPLE / script), *arguments],
        env=os.environ | {"COLUMNS": "140", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
    )


def _start(script: str, *arguments: str) -> str:
    done = _run(script, *arguments)
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


@slow
def test_a_plan_is_run_measured_and_resumed(tmp_path: Path) -> None:
    models, out = tmp_path / "models", tmp_path / "comparison"
    _start("pretrain.py", "--small", "--out", str(models))
    parts = [(models / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test")]
    assert not set(parts[0]) & set(parts[1])

    arguments = ("--plan", "small", "--models", str(models), "--out", str(out))
    printed = _start("compare.py", *arguments)
    for name in ("OPRD", "OPRD, then top-1", "RIDE"):
        assert f"│ {name} " in printed
    for name in ("curves.png", "positions.png"):
        assert (out / name).stat().st_size > 0
    content = json.loads((out / "results.json").read_text())
    assert all(math.isfinite(number) for number in _numbers(content))
    runs = {_name(result["run"]): result for result in content["results"]}
    swept = {lr: runs[f"oprd_{lr:g}_0"]["measures"]["accuracy"] for lr in (1e-4, 1e-3)}
    chosen = max(swept, key=lambda lr: swept[lr])
    reported = [f"oprd_{chosen:g}_1", f"oprd_then_top1_{0.001:g}_1", f"ride_{0.001:g}_1"]
    assert sorted(runs) == sorted(["oprd_0.0001_0", "oprd_0.001_0", *reported])
    for name in reported:
        curve, measures = runs[name]["curve"], runs[name]["measures"]
        assert list(curve["accuracy"]) == ["2", "4"]
        assert 0 < curve["seconds"]["2"] < curve["seconds"]["4"]
        assert 0 < measures["cosine"] <= 1.001
        assert measures["kl"] > -1e-6
        assert measures["num_problems"] == len(parts[1])
    switched = _metrics(out / "runs" / "rl_8_oprd_then_top1_lr0.001_seed1")
    assert [record["loss_coefficient"] for record in switched] == [1, 1, 1, 0]
    assert [record["output_loss_coefficient"] for record in switched] == [0, 0, 0, 1]

    # What is there is not run again: one run is missing, and the others' files stay.
    results = sorted((out / "runs").glob("*/result.json"))
    written = {path: path.stat().st_mtime_ns for path in results}
    results[0].unlink()
    again = _start("compare.py", "--report", *arguments)
    assert "wrote" in again
    assert not results[0].exists()
    assert all(path.stat().st_mtime_ns == written[path] for path in results[1:])


@slow
def test_the_models_have_to_be_of_the_plans_task(tmp_path: Path) -> None:
    models = tmp_path / "models"
    _start("pretrain.py", "--small", "--task", "chains", "--out", str(models))
    assert not (models / "rl").exists()
    arguments = ("--plan", "small", "--models", str(models), "--out", str(tmp_path / "out"))
    refused = _run("compare.py", *arguments)
    assert refused.returncode == 2
    assert "--plan small compares on sums" in refused.stderr
    assert "pretrain.py --task sums" in refused.stderr


@slow
def test_a_wider_teacher(tmp_path: Path) -> None:
    models, out = tmp_path / "models", tmp_path / "widths"
    _start("pretrain.py", "--small", "--out", str(models))
    printed = _start("widths.py", "--small", "--models", str(models), "--out", str(out))
    runs = json.loads((out / "widths.json").read_text())["runs"]
    assert all(run["method"] in printed for run in runs)
    assert len(runs) == 7
    for run in runs:
        assert list(run["accuracy"]) == list(run["cosine"]) == ["1", "2", "3", "4"]
        assert (None in run["cosine"].values()) == (run["method"] == "top-16")


def _name(run: dict[str, Any]) -> str:
    return f"{run['method']}_{run['lr']:g}_{run['seed']}"


def test_every_method_has_a_valid_configuration(example: None, tmp_path: Path) -> None:
    runs, plan = importlib.import_module("runs"), importlib.import_module("plan")
    methods, task = importlib.import_module("methods"), importlib.import_module("task")
    task.write_problems(tmp_path / "models" / "test.jsonl", [task.addition(500, 600)])
    seen = set()
    for one in plan.PLANS.values():
        for cell in one.cells:
            for run in [*cell.sweep(), *cell.runs({})]:
                assert run.lr > 0
                if run.method in seen:
                    continue
                config = runs.configuration(
                    run, models=tmp_path / "models", out=tmp_path, budget=one.budget
                )
                path = tmp_path / "run.yaml"
                path.write_text(yaml.safe_dump(config))
                load_config(path)
                seen.add(run.method)
    assert seen == set(methods.BY_KEY)


def test_measures_compare_a_student_with_its_teacher(example: None, tmp_path: Path) -> None:
    pretrain, task = importlib.import_module("pretrain"), importlib.import_module("task")
    measures = importlib.import_module("measures")
    tokenizer = task.make_tokenizer()
    torch.manual_seed(0)
    for name in ("student", "teacher"):
        model = LlamaForCausalLM(pretrain.model_config(pretrain.SMALL, tokenizer))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    problems = [task.addition(left, 456) for left in range(580, 600)]
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    itself = measures.measure(student, student, problems, num_sampled=16)
    assert itself.cosine == pytest.approx(1)
    assert itself.kl == pytest.approx(0, abs=1e-6)
    assert itself.first_token == 1
    other = measures.measure(student, teacher, problems, num_sampled=16)
    assert other.cosine < 0.9
    assert other.kl > 0.001
    assert len(other.kl_by_position) == len("6301=1036") + 1


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
    response: str, right: bool, example: None
) -> None:
    task = importlib.import_module("task")
    problem = task.addition(123, 456)
    assert (problem.prompt, problem.response) == ("123+456:", "975=579")
    assert task.is_correct(response, problem.answer) == right


def test_a_chain_sums_the_last_two_digits(example: None) -> None:
    task = importlib.import_module("task")
    problem = task.chain(123, 456)
    assert problem.prompt == "1234+5+6"
    # 5+6, 6+1, 1+7, 7+8, 8+5, 5+3 ...
    assert problem.response.startswith("=1b7c8d5e3f8g1")
    assert problem.response == "=" + problem.answer
    assert task.max_new_tokens([problem]) == 2 * 52 + 1
