"""Runs `megatron_oprd.train` for one run, and reads what it left behind."""

import importlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from methods import BY_KEY
from processes import log_to
from task import Problem, is_correct, max_new_tokens, read_problems

from megatron_oprd.data.prompts import prompt_indices

_PROMPTS = "prompts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every run gets, whatever its method.

    Attributes:
        steps: Optimizer steps.
        interval: Steps between evaluations.
        curve_problems: Held-out problems of such an evaluation.
    """

    steps: int
    interval: int
    curve_problems: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the comparison.

    Attributes:
        pair: The teacher's folder; both pairs have the same student.
        method: `methods.Method.key`.
        responses: Prompts of a step, with one response each.
        lr: Peak learning rate.
        seed: Of the order of prompts and of the responses; 0 is the sweep's.
    """

    pair: str
    method: str
    responses: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{self.pair}_{self.responses}_{self.method}_lr{self.lr:g}_seed{self.seed}"

    @property
    def is_sweep(self) -> bool:
        """Whether it chooses a learning rate, on the validation problems."""
        return self.seed == 0


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a run wrote down while it trained; a run of the sweep is not evaluated on the way.

    Attributes:
        accuracy: Steps done -> share of the first `Budget.curve_problems` test problems that are
            solved with the most likely tokens.
        seconds: Steps done -> seconds of all steps until then, without start and evaluation.
    """

    accuracy: dict[int, float]
    seconds: dict[int, float]

    def steps_to(self, target: float) -> int | None:
        """Steps until the first evaluation with at least this accuracy; None if there is none."""
        return next(
            (step for step, value in sorted(self.accuracy.items()) if value >= target), None
        )


def train(run: Run, *, models: Path, out: Path, budget: Budget) -> Curve:
    """Trains the student; see `start`.

    Args:
        run: The run.
        models: What pretrain.py wrote.
        out: Folder of the run; what it holds of an earlier one is removed.
        budget: What every run gets.
    """
    config = configuration(run, models=models, out=out, budget=budget)
    start("train", config, out, prompts=prompts_of(run, models=models, budget=budget))
    return curve_of(out, read_problems(models / "test.jsonl")[: budget.curve_problems])


def prompts_of(run: Run, *, models: Path, budget: Budget) -> list[str]:
    """The prompts of all steps in their order, as lines of JSON.

    They are the run's own file: tokenizing all problems takes as long as the steps.
    """
    lines = (models / "train.jsonl").read_text().splitlines()
    order = prompt_indices(
        0,
        num_prompts=len(lines),
        prompts_per_step=budget.steps * run.responses,
        seed=run.seed,
    )
    return [lines[i] for i in order]


def start(command: str, config: Mapping[str, Any], out: Path, *, prompts: Sequence[str]) -> None:
    """Runs a command of the program on a configuration, in this process.

    ``prompts`` become the file that the configuration names.

    Call it once in a process: process groups and the like are global. What an earlier run left in
    ``out`` is removed, and all later output of the process goes to ``out/log``.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _PROMPTS).write_text("".join(f"{line}\n" for line in prompts))
    (out / "run.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    log_to(out / "log")
    sys.argv = [command, "--config", str(out / "run.yaml")]
    code = importlib.import_module(f"megatron_oprd.{command}").main()
    assert code == 0, f"{out} ended with exit code {code}"


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """The metrics of each step of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve_of(out: Path, problems: Sequence[Problem]) -> Curve:
    """What a run that was evaluated on ``problems`` wrote down while it trained."""
    records = metrics_of(out)
    answers = {i: problem.answer for i, problem in enumerate(problems)}
    accuracy, seconds, passed = {}, {}, 0.0
    for record in records:
        passed += record["seconds_step"]
        if "seconds_evaluation" in record:
            step = record["step"] + 1
            samples = out / "evaluation" / f"step_{step}" / "test.jsonl"
            accuracy[step], seconds[step] = _score(samples, answers), passed
    return Curve(accuracy=accuracy, seconds=seconds)


def configuration(run: Run, *, models: Path, out: Path, budget: Budget) -> dict[str, Any]:
    """The run's configuration file."""
    student = str(models / "student")
    longest = max_new_tokens(read_problems(models / "test.jsonl"))
    config: dict[str, Any] = {
        "output_dir": str(out),
        "train_iters": budget.steps,
        "seed": run.seed,
        "tensorboard": False,
        "model": {
            "student": student,
            "teacher": str(models / run.pair),
            "params_dtype": "fp32",
            # Rows of padding would be more than the tokens.
            "make_vocab_size_divisible_by": 1,
        },
        "data": {"prompts": [str(out / _PROMPTS)], "shuffle": False, "max_prompt_tokens": 16},
        "rollout": {
            "prompts_per_step": run.responses,
            "samples_per_prompt": 1,
            "max_new_tokens": longest,
            "temperature": 1.0,
        },
        "optimizer": {
            "lr": run.lr,
            "lr_warmup_fraction": 0.1,
            "weight_decay": 0.0,
            "clip_grad": 1.0,
        },
        "checkpoint": {"save_interval": None},
    }
    # The sweep looks at the end only, which measures.py does.
    if not run.is_sweep:
        config["evaluation"] = {
            "interval": budget.interval,
            "data": [str(models / "test.jsonl")],
            "limit": budget.curve_problems,
            "n": 1,
            "max_new_tokens": longest,
            "temperature": 0.0,
            "top_p": 1.0,
        }
    method = BY_KEY[run.method].settings_of_run(steps=budget.steps, student=student)
    for group, settings in method.items():
        config[group] = config.get(group, {}) | settings
    return config


def _score(samples: Path, answers: Mapping[int, str]) -> float:
    """Share of problems whose response has exactly the right answer behind its last "=".

    The run's own grading looks for a boxed answer, which these responses do not have.
    """
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert sorted(line["prompt_index"] for line in lines) == sorted(answers)
    solved = [is_correct(line["response"], answers[line["prompt_index"]]) for line in lines]
    return sum(solved) / len(solved)
