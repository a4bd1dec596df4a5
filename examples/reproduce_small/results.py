"""What a comparison found: its runs, with what they are measured against."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, variance
from typing import Any

from measures import Measures
from methods import BY_KEY
from plan import Cell, Plan
from runs import Curve, Run

NEAR_TEACHER = 0.95


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run.

    Attributes:
        run: Its settings.
        curve: What it wrote down on the way.
        measures: Its student; of a run of the sweep on the validation problems.
    """

    run: Run
    curve: Curve
    measures: Measures

    def write(self, path: Path) -> None:
        """Writes it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Reads what `write` wrote."""
        content = json.loads(path.read_text())
        # JSON's keys are texts.
        curve = {
            name: {int(step): value for step, value in values.items()}
            for name, values in content["curve"].items()
        }
        return cls(
            run=Run(**content["run"]),
            curve=Curve(**curve),
            measures=Measures(**content["measures"]),
        )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What one pair's runs are measured against, on the test problems.

    Attributes:
        teacher_accuracy: The teacher's.
        target: `NEAR_TEACHER` of its accuracy on the problems of the runs' evaluations.
        before: The student before any step.
        before_on_curve: Its accuracy on the problems of the runs' evaluations.
    """

    teacher_accuracy: float
    target: float
    before: Measures
    before_on_curve: float


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One method in one cell.

    Attributes:
        name: `methods.Method.name`.
        key: `methods.Method.key`.
        runs: Its runs, by seed.
    """

    name: str
    key: str
    runs: Sequence[Result]

    @property
    def lr(self) -> float:
        """Their learning rate."""
        return self.runs[0].run.lr

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return self.mean_of("accuracy")

    @property
    def standard_error(self) -> float:
        """Of the mean: by the draw of the problems, which all seeds share, and by the seeds."""
        values = [result.measures.accuracy for result in self.runs]
        problems = self.accuracy * (1 - self.accuracy) / self.runs[0].measures.num_problems
        seeds = variance(values) / len(values) if len(values) > 1 else 0.0
        return math.sqrt(problems + seeds)

    def mean_of(self, name: str) -> float:
        """Mean of one of the measures over the seeds."""
        return mean(getattr(result.measures, name) for result in self.runs)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All runs.

    Attributes:
        plan: What they are.
        references: By pair.
        results: All runs of the plan that are there, the sweep's as well.
    """

    plan: Plan
    references: dict[str, Reference]
    results: list[Result]

    def methods_of(self, cell: Cell) -> list[MethodResult]:
        """The methods with reported runs in a cell, in the table's order."""
        found = []
        for method in BY_KEY.values():
            runs = [
                result
                for result in self._of(cell)
                if result.run.method == method.key and not result.run.is_sweep
            ]
            if runs:
                runs.sort(key=lambda result: result.run.seed)
                found.append(MethodResult(name=method.name, key=method.key, runs=runs))
        return found

    def sweep_of(self, cell: Cell) -> dict[str, dict[float, float]]:
        """Method -> learning rate -> accuracy on the validation problems."""
        found: dict[str, dict[float, float]] = {}
        for result in self._of(cell):
            if result.run.is_sweep:
                found.setdefault(result.run.method, {})[result.run.lr] = result.measures.accuracy
        return found

    def chosen_in(self, cell: Cell) -> dict[str, float]:
        """The learning rates with the highest accuracy in a cell's sweep, by method."""
        return {
            method: max(by_lr, key=lambda lr: by_lr[lr])
            for method, by_lr in self.sweep_of(cell).items()
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, with the means of each cell."""
        return {
            **asdict(self),
            "cells": {
                cell.key: {
                    method.key: {
                        "lr": method.lr,
                        "accuracy": method.accuracy,
                        "standard_error": method.standard_error,
                        "seeds": len(method.runs),
                    }
                    for method in self.methods_of(cell)
                }
                for cell in self.plan.cells
            },
        }

    def _of(self, cell: Cell) -> list[Result]:
        return [
            result
            for result in self.results
            if (result.run.pair, result.run.responses) == (cell.pair, cell.responses)
        ]
