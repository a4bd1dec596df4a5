r"""Compares the methods: `megatron_oprd.train` for each of them and each seed, then the tables.

python examples/reproduce_small/compare.py --models runs/reproduce_small/models \
    --out runs/reproduce_small/comparison [--plan full] [--seeds N] [--jobs 2] [--report]

It prints tables and writes ``results.json`` and three pictures. plan.py has the plans. All runs
start from the same student, and those of one seed see the same prompts in the same order. A
comparison that was stopped goes on where it was: a run whose ``result.json`` is there is not
repeated.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from measures import Measures, measure
from plan import PLANS, Plan
from pretrain import MODELS_RECORD
from processes import in_processes
from report import report
from results import NEAR_TEACHER, Comparison, Reference, Result
from rich.console import Console
from runs import Run, train
from task import Problem, accuracy, read_problems
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_oprd.console import make_console
from megatron_oprd.errors import UserError, run_entry_point

_RESULT = "result.json"
_CONDITIONS = "conditions.json"


def main() -> int:
    """Parses the command line, runs everything, writes and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="what pretrain.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and results")
    parser.add_argument("--plan", choices=list(PLANS), default="default", help="which runs")
    parser.add_argument("--seeds", type=int, help="runs of each method; by default the plan's")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument(
        "--report", action="store_true", help="tables of the runs that are there; starts none"
    )
    arguments = parser.parse_args()
    if not (arguments.models / MODELS_RECORD).exists():
        raise UserError(
            f"--models: {arguments.models} has no {MODELS_RECORD}; run pretrain.py with --out "
            f"{arguments.models} first"
        )
    plan = PLANS[arguments.plan]
    found = json.loads((arguments.models / MODELS_RECORD).read_text())["settings"]["task"]
    if found != plan.task:
        raise UserError(
            f"--plan {arguments.plan} compares on {plan.task}, and --models {arguments.models} are "
            f"of {found}; make others with pretrain.py --task {plan.task}"
        )
    if arguments.seeds is not None:
        cells = [dataclasses.replace(cell, seeds=arguments.seeds) for cell in plan.cells]
        plan = dataclasses.replace(plan, cells=cells)
    for setting, value in (("--seeds", arguments.seeds), ("--jobs", arguments.jobs)):
        if value is not None and value < 1:
            raise UserError(f"{setting} = {value}: has to be 1 or more")
    Comparer(
        models=arguments.models,
        out=arguments.out,
        plan=plan,
        # Without a job nothing starts.
        jobs=0 if arguments.report else arguments.jobs,
    ).compare()
    return 0


class Comparer:
    """Runs a plan and reports it after every cell.

    Args:
        models: What pretrain.py wrote.
        out: Folder of runs and results.
        plan: The runs.
        jobs: Runs at a time; with 0 only those that are there are read.
    """

    def __init__(self, *, models: Path, out: Path, plan: Plan, jobs: int) -> None:
        self._models, self._out, self._plan, self._jobs = models, out, plan, jobs
        self._problems = {
            part: read_problems(models / f"{part}.jsonl") for part in ("validation", "test")
        }

    def compare(self) -> None:
        """Runs cell after cell.

        Raises:
            UserError: The folder has runs of other models or of another budget.
        """
        self._refuse_other_runs()
        comparison = Comparison(
            plan=self._plan,
            references={
                pair: self._reference(pair) for pair in {c.pair: None for c in self._plan.cells}
            },
            results=[],
        )
        first: dict[str, float] = {}
        for cell in self._plan.cells:
            comparison.results.extend(self._run_all(list(cell.sweep())))
            chosen = comparison.chosen_in(cell)
            first = first or chosen
            comparison.results.extend(self._run_all(list(cell.runs(first | chosen))))
            report(comparison, self._out, Console(quiet=True))
        report(comparison, self._out, make_console())

    def _run_all(self, runs: Sequence[Run]) -> Iterator[Result]:
        """Trains and measures what is not there yet; in the order of ``runs``."""
        there = [run for run in runs if (self._folder(run) / _RESULT).exists()]
        yield from (Result.read(self._folder(run) / _RESULT) for run in there)
        missing = [run for run in runs if run not in there]
        if not self._jobs:
            return
        for result in in_processes(self._run, missing, jobs=self._jobs):
            print(
                f"{result.run.name}  accuracy {result.measures.accuracy:.3f}  "
                f"KL {result.measures.kl:.3f}",
                flush=True,
            )
            yield result

    def _run(self, run: Run) -> Result:
        """Trains and measures, in a process of its own."""
        folder = self._folder(run)
        curve = train(run, models=self._models, out=folder, budget=self._plan.budget)
        result = Result(run=run, curve=curve, measures=self._measure(run))
        result.write(folder / _RESULT)
        return result

    def _refuse_other_runs(self) -> None:
        """Runs that are there are kept, so they have to be this comparison's."""
        record = json.loads((self._models / MODELS_RECORD).read_text())
        content = json.dumps(
            {"budget": dataclasses.asdict(self._plan.budget), "models": record}, indent=2
        )
        path = self._out / _CONDITIONS
        if path.exists() and path.read_text() != content:
            raise UserError(
                f"--out: {self._out} has runs of other models or of other lengths; give another "
                "folder, or remove it"
            )
        self._out.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def _measure(self, run: Run) -> Measures:
        """Measures a trained student; one of the sweep on the problems that choose."""
        return self._measure_folder(
            self._folder(run) / "student",
            run.pair,
            self._problems["validation" if run.is_sweep else "test"],
        )

    def _measure_folder(self, folder: Path, pair: str, problems: Sequence[Problem]) -> Measures:
        return measure(folder, self._models / pair, problems, num_sampled=self._plan.num_sampled)

    def _reference(self, pair: str) -> Reference:
        test = self._problems["test"]
        on_curve = test[: self._plan.budget.curve_problems]
        teacher, student = self._models / pair, self._models / "student"
        return Reference(
            teacher_accuracy=_accuracy_of(teacher, test),
            target=NEAR_TEACHER * _accuracy_of(teacher, on_curve),
            before=self._measure_folder(student, pair, test),
            before_on_curve=_accuracy_of(student, on_curve),
        )

    def _folder(self, run: Run) -> Path:
        return self._out / "runs" / run.name


def _accuracy_of(folder: Path, problems: Sequence[Problem]) -> float:
    """A saved model's accuracy."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return accuracy(model, tokenizer, problems)


if __name__ == "__main__":
    run_entry_point(main)
