r"""Compares the methods: one run of `megatron_oprd.train` for each of them and each seed.

python examples/reproduce_small/compare.py --models runs/reproduce_small/models \
    --out runs/reproduce_small/comparison [--seeds 3] [--small]

It writes ``results.json`` and ``curves.png`` and prints the table. All runs of a seed start from
the same student and see the same prompts in the same order for the same number of steps.

``--sweep LR ...`` instead runs each method once at each learning rate, for a quarter of the steps,
on seed 0 and the validation problems, and writes ``sweep.json``; methods.py holds the choice.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from methods import METHODS, Method
from pretrain import MODELS_RECORD
from results import Comparison, comparison_table, curves_figure, sweep_table
from rich.console import Console
from runs import Budget, Result, run_method, start_memory_mb
from task import accuracy, read_problems
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_oprd.errors import UserError, run_entry_point

BUDGET = Budget(steps=200, prompts_per_step=64, interval=20, mu=10.0)
# For the tests: too short to tell methods apart.
SMALL = Budget(steps=4, prompts_per_step=8, interval=2, mu=10.0)
_SWEEP_SEED = 0


def main() -> int:
    """Parses the command line, runs everything, writes and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="what pretrain.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and results")
    parser.add_argument("--seeds", type=int, help="runs of each method (3; with --small 1)")
    parser.add_argument("--small", action="store_true", help="seconds, for the tests")
    parser.add_argument("--sweep", type=float, nargs="+", metavar="LR", help="learning rates")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time (1); with more, seconds are of runs that share the cores",
    )
    arguments = parser.parse_args()
    if not (arguments.models / MODELS_RECORD).exists():
        raise UserError(
            f"--models: {arguments.models} has no {MODELS_RECORD}; run pretrain.py with --out "
            f"{arguments.models} first"
        )
    seeds = (1 if arguments.small else 3) if arguments.seeds is None else arguments.seeds
    for setting, value in (("--seeds", seeds), ("--jobs", arguments.jobs)):
        if value < 1:
            raise UserError(f"{setting} = {value}: has to be 1 or more")
    budget = SMALL if arguments.small else BUDGET
    if arguments.sweep:
        short = dataclasses.replace(budget, steps=budget.steps // 4, interval=budget.interval // 2)
        sweep(arguments.models, arguments.out, short, arguments.sweep, jobs=arguments.jobs)
    else:
        compare(arguments.models, arguments.out, budget, seeds=seeds, jobs=arguments.jobs)
    return 0


def compare(models: Path, out: Path, budget: Budget, *, seeds: int, jobs: int) -> None:
    """Runs every method on seeds 1 to ``seeds``; writes ``results.json`` and ``curves.png``."""
    started = time.perf_counter()
    problems = models / "test.jsonl"

    def run(seed: int, method: Method) -> Result:
        return run_method(
            method,
            models=models,
            problems=problems,
            out=out / "runs" / f"{method.key}_seed{seed}",
            budget=budget,
            seed=seed,
            lr=method.lr,
        )

    tasks = [partial(run, seed, method) for seed in range(1, seeds + 1) for method in METHODS]
    results = list(_run_all(tasks, jobs))
    comparison = Comparison(
        budget=budget,
        teacher_accuracy=_accuracy_of(models / "teacher", problems),
        student_accuracy=_accuracy_of(models / "student", problems),
        start_memory_mb=start_memory_mb(),
        results=results,
    )
    _write_json(
        out / "results.json",
        {
            **dataclasses.asdict(comparison),
            "seconds": time.perf_counter() - started,
            "models": json.loads((models / MODELS_RECORD).read_text()),
        },
    )
    curves_figure(comparison).savefig(out / "curves.png")
    console = Console()
    console.print(comparison_table(comparison))
    console.print(f"wrote {out}/results.json and {out}/curves.png", highlight=False, soft_wrap=True)


def sweep(
    models: Path, out: Path, budget: Budget, learning_rates: Sequence[float], *, jobs: int
) -> None:
    """Runs every method at every learning rate on the validation problems; ``sweep.json``."""

    def run(method: Method, lr: float) -> Result:
        return run_method(
            method,
            models=models,
            problems=models / "validation.jsonl",
            out=out / "runs" / f"{method.key}_lr{lr:g}",
            budget=budget,
            seed=_SWEEP_SEED,
            lr=lr,
        )

    tasks = [partial(run, method, lr) for method in METHODS for lr in learning_rates]
    results = list(_run_all(tasks, jobs))
    _write_json(out / "sweep.json", [dataclasses.asdict(result) for result in results])
    Console().print(sweep_table(results))


def _run_all(tasks: Sequence[Callable[[], Result]], jobs: int) -> Iterator[Result]:
    """Runs tasks, ``jobs`` at a time, and says how each one ended; in the tasks' order."""
    with ThreadPoolExecutor(jobs) as pool:
        for result in pool.map(lambda task: task(), tasks):
            print(
                f"{result.method}  seed {result.seed}  lr {result.lr:g}  "
                f"accuracy {result.final:.3f}  mean {result.mean:.3f}  {result.seconds:.1f} s",
                flush=True,
            )
            yield result


def _accuracy_of(folder: Path, problems: Path) -> float:
    """A saved model's accuracy."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return accuracy(model, tokenizer, read_problems(problems))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    run_entry_point(main)
