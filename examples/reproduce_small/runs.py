"""Starts `megatron_oprd.train` for one method, and reads what it left behind."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from methods import Method
from task import MAX_NEW_TOKENS, is_correct, read_problems

_MEASURED = ("seconds_weight_sync", "seconds_rollout", "seconds_teacher", "seconds_student")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every run gets, whatever its method.

    Attributes:
        steps: Optimizer steps.
        prompts_per_step: Prompts of a step, one response each.
        interval: Steps between evaluations.
        mu: Factor on OPRD's loss beside the sampled-token loss.
    """

    steps: int
    prompts_per_step: int
    interval: int
    mu: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run.

    Attributes:
        method: `Method.key`.
        seed: The run's seed.
        lr: Its peak learning rate.
        accuracy: Steps done -> share of held-out problems solved with the most likely tokens.
        seconds: Of all steps, without start and evaluation.
        seconds_by_part: The same by part of a step.
        peak_memory_mb: Peak resident set of the process (10^6 bytes).
    """

    method: str
    seed: int
    lr: float
    accuracy: dict[int, float]
    seconds: float
    seconds_by_part: dict[str, float]
    peak_memory_mb: float

    @property
    def final(self) -> float:
        """Accuracy at the end."""
        return self.accuracy[max(self.accuracy)]

    @property
    def mean(self) -> float:
        """Mean of the accuracy over the evaluations: high for a run that is good early."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    def steps_to(self, target: float) -> int | None:
        """Steps until the first evaluation with at least this accuracy; None if there is none."""
        return next(
            (step for step, value in sorted(self.accuracy.items()) if value >= target), None
        )


def run_method(
    method: Method,
    *,
    models: Path,
    problems: Path,
    out: Path,
    budget: Budget,
    seed: int,
    lr: float,
) -> Result:
    """Trains the student by one method in a process of its own.

    Args:
        method: The method.
        models: What pretrain.py wrote.
        problems: The held-out problems that are solved along the way.
        out: Folder of the run; what it holds of an earlier one is removed.
        budget: What every run gets.
        seed: Of the order of prompts and of the responses.
        lr: Peak learning rate.

    Raises:
        subprocess.CalledProcessError: The run failed; its output is in ``out/log``.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = _config(
        method, models=models, problems=problems, out=out, budget=budget, seed=seed, lr=lr
    )
    (out / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "megatron_oprd.train", "--config", str(out / "run.yaml")]
    with (out / "log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    answers = {i: problem.answer for i, problem in enumerate(read_problems(problems))}
    return Result(
        method=method.key,
        seed=seed,
        lr=lr,
        accuracy={
            step: _score(out / "evaluation" / f"step_{step}" / f"{problems.stem}.jsonl", answers)
            for step in (record["step"] + 1 for record in records if "seconds_evaluation" in record)
        },
        seconds=sum(record["seconds_step"] for record in records),
        seconds_by_part={
            name.removeprefix("seconds_"): sum(record[name] for record in records)
            for name in (*_MEASURED, "seconds_optimizer")
        },
        peak_memory_mb=1000 * records[-1]["peak_memory_gb"],
    )


def start_memory_mb() -> float:
    """Peak resident set (10^6 bytes) of a process that imports the program and does no more."""
    code = (
        "import resource, megatron_oprd.train;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
    return int(done.stdout) * 1024 / 1e6


def _config(
    method: Method,
    *,
    models: Path,
    problems: Path,
    out: Path,
    budget: Budget,
    seed: int,
    lr: float,
) -> dict[str, Any]:
    """The run's configuration file."""
    composed = "output_loss" in method.settings and method.settings["taps"]["layers"] != "none"
    common: dict[str, Any] = {
        "output_dir": str(out),
        "train_iters": budget.steps,
        "seed": seed,
        "tensorboard": False,
        "model": {
            "student": str(models / "student"),
            "teacher": str(models / "teacher"),
            "params_dtype": "fp32",
            # Rows of padding would be more than the tokens.
            "make_vocab_size_divisible_by": 1,
        },
        "loss": {"normalize": "none", "coefficient": budget.mu if composed else 1.0},
        "data": {"prompts": [str(models / "train.jsonl")], "max_prompt_tokens": 16},
        "rollout": {
            "prompts_per_step": budget.prompts_per_step,
            "samples_per_prompt": 1,
            "max_new_tokens": MAX_NEW_TOKENS,
            "temperature": 1.0,
        },
        "optimizer": {"lr": lr, "lr_warmup_fraction": 0.1, "weight_decay": 0.0, "clip_grad": 1.0},
        "checkpoint": {"save_interval": None},
        "evaluation": {
            "interval": budget.interval,
            "data": [str(problems)],
            "n": 1,
            "max_new_tokens": MAX_NEW_TOKENS,
            "temperature": 0.0,
            "top_p": 1.0,
        },
    }
    return common | method.settings


def _score(samples: Path, answers: Mapping[int, str]) -> float:
    """Share of problems whose response has exactly the right answer behind its last "=".

    The run's own grading looks for a boxed answer, which these responses do not have.
    """
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert sorted(line["prompt_index"] for line in lines) == sorted(answers)
    solved = [is_correct(line["response"], answers[line["prompt_index"]]) for line in lines]
    return sum(solved) / len(solved)
