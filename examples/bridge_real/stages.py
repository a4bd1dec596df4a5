"""The program's own commands: a bridge, a training run through it, and the evaluation."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from slim import Sizes

_DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How large everything is.

    Attributes:
        layers: Layers of the students, evenly spaced ones of the teacher's.
        sizes: Of the students.
        num_prompts: Prompts of examples/data/math_train.jsonl that are used.
        max_new_tokens: Longest answer.
        answers: Answers of the teacher to each prompt, for the brief training.
        vocab_size: Tokens that a trained tokenizer is asked for.
        heal_steps: Steps of the brief training.
        heal_batch: Answers in one of them.
        heal_lr: Its peak learning rate.
        bridge_prompts: Prompts of the bridge's rollouts, two responses each.
        ranks: Ranks that the bridge reports.
        rank: The one that is trained through.
        steps: Steps through the bridge.
        prompts_per_step: Prompts of a step, and of a round of the bridge's rollouts.
        lr: Peak learning rate of these steps.
    """

    layers: int
    sizes: Sizes
    num_prompts: int
    max_new_tokens: int
    answers: int
    vocab_size: int
    heal_steps: int
    heal_batch: int
    heal_lr: float
    bridge_prompts: int
    ranks: tuple[int, ...]
    rank: int
    steps: int
    prompts_per_step: int
    lr: float


def run_bridge(
    folder: Path, teacher: Path, budget: Budget, *, seed: int, own: bool
) -> dict[str, Any]:
    """Builds ``folder/bridge`` for ``folder/before`` and returns its manifest.

    Args:
        folder: Of the student.
        teacher: The teacher's folder.
        budget: Sizes.
        seed: Of the rollouts.
        own: Whether the teacher reads the text in its own tokens.

    Raises:
        subprocess.CalledProcessError: The command failed; its output is in ``folder/bridge.log``.
    """
    settings = _common(folder, teacher, budget, seed=seed, own=own, samples=2) | {
        "output_dir": str(folder / "bridge"),
        "fit": {
            "ranks": list(budget.ranks),
            "num_prompts": budget.bridge_prompts,
            "ridge": 1e-2,
            "held_out_share": 0.25,
        },
    }
    _start("build_bridge", settings, folder / "bridge.yaml")
    manifest: dict[str, Any] = json.loads((folder / "bridge" / "manifest.json").read_text())
    return manifest


def train(
    folder: Path,
    teacher: Path,
    budget: Budget,
    *,
    seed: int,
    own: bool,
    name: str = "run",
    lr: float | None = None,
) -> list[dict[str, Any]]:
    """Trains ``folder/before`` through ``folder/bridge`` to ``folder/<name>``.

    Args and errors as for `run_bridge`; the output is in ``folder/<name>.log``. ``lr`` takes the
    place of the budget's.

    Returns:
        The metrics, a record each step.
    """
    lr = budget.lr if lr is None else lr
    settings = _common(folder, teacher, budget, seed=seed, own=own, samples=1) | {
        "output_dir": str(folder / name),
        "train_iters": budget.steps,
        "tensorboard": False,
        "bridge": {"path": str(folder / "bridge"), "rank": budget.rank},
        # Unit vectors, and the squared distance of them, not divided by their length.
        "loss": {"normalize": "l2", "coefficient": float(budget.rank)},
        "optimizer": {
            "lr": lr,
            "min_lr": lr / 10,
            "lr_warmup_fraction": 0.2,
            "weight_decay": 0.0,
            "clip_grad": 1.0,
        },
        "checkpoint": {"save_interval": None},
    }
    _start("train", settings, folder / f"{name}.yaml")
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def evaluate(folder: Path, teacher: Path, max_new_tokens: int) -> dict[str, Any]:
    """Compares the student's three stages with the teacher on its greedy held-out answers.

    Raises:
        subprocess.CalledProcessError: The command failed; its output is in
            ``folder/evaluate.log``.
    """
    names = {"start": "start", "before": "before", "after": "run/student"}
    output = folder / "evaluation.json"
    command = [
        "--teacher", str(teacher), "--student", *(f"{n}={folder / at}" for n, at in names.items()),
        "--prompts", str(_DATA / "math_heldout.jsonl"),
        "--max-new-tokens", str(max_new_tokens), "--batch-size", "16", "--output", str(output),
    ]  # fmt: skip
    _command("evaluate", command, folder / "evaluate.log")
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def _common(
    folder: Path, teacher: Path, budget: Budget, *, seed: int, own: bool, samples: int
) -> dict[str, Any]:
    return {
        "seed": seed,
        "model": {
            "student": str(folder / "before"),
            "teacher": str(teacher),
            "params_dtype": "fp32",
        },
        "teacher_prompt": {"tokenizer": "own" if own else "same"},
        "data": {"prompts": [str(_DATA / "math_train.jsonl")], "max_prompt_tokens": 256},
        "rollout": {
            "prompts_per_step": budget.prompts_per_step,
            "samples_per_prompt": samples,
            "max_new_tokens": budget.max_new_tokens,
            "temperature": 1.0,
        },
        "batch": {"max_tokens": 2048},
    }


def _start(module: str, settings: dict[str, Any], file: Path) -> None:
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    _command(module, ["--config", str(file)], file.with_suffix(".log"))


def _command(module: str, arguments: list[str], log: Path) -> None:
    with log.open("w") as out:
        command = [sys.executable, "-m", f"megatron_oprd.{module}", *arguments]
        subprocess.run(command, check=True, stdout=out, stderr=out)
