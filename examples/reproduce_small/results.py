"""The comparison's table and picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from methods import METHODS
from rich.table import Table
from runs import Budget, Result

NEAR_TEACHER = 0.95
# Okabe and Ito's colours, told apart by colour-blind readers.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
_LINES = ("-", "--", "-.", ":", "-")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All runs, and what they are measured against.

    Attributes:
        budget: What every run got.
        teacher_accuracy: On the test problems.
        student_accuracy: Likewise, before any step.
        start_memory_mb: `runs.start_memory_mb`.
        results: The runs, seed by seed.
    """

    budget: Budget
    teacher_accuracy: float
    student_accuracy: float
    start_memory_mb: float
    results: list[Result]

    def of(self, key: str) -> list[Result]:
        """One method's runs, by seed."""
        return [result for result in self.results if result.method == key]


def comparison_table(comparison: Comparison) -> Table:
    """One row a method: means over its seeds, and each seed's steps to 95% of the teacher."""
    num_seeds = len({result.seed for result in comparison.results})
    table = Table(
        title=(
            f"teacher {comparison.teacher_accuracy:.1%}, student {comparison.student_accuracy:.1%} "
            f"before; {comparison.budget.steps} steps, seeds: {num_seeds}"
        ),
        caption=(
            "accuracy: at the end, mean of the seeds; range: its lowest and highest; curve: mean "
            "over all evaluations; steps to 95% of the teacher's accuracy, by seed; s: seconds of "
            "all steps, s passes: without rollout and weight sync; MB: peak resident set beyond "
            "that of a process that only imports the program"
        ),
    )
    table.add_column("method", no_wrap=True)
    for name in (
        "lr",
        "accuracy",
        "range",
        "curve",
        f"steps to {NEAR_TEACHER:.0%}",
        "s",
        "s passes",
        "MB",
    ):
        table.add_column(name, justify="right")
    target = NEAR_TEACHER * comparison.teacher_accuracy
    for method in METHODS:
        runs = comparison.of(method.key)
        final = [run.final for run in runs]
        steps = [run.steps_to(target) for run in runs]
        table.add_row(
            method.name,
            f"{runs[0].lr:g}",
            f"{mean(final):.1%}",
            f"{min(final):.1%}-{max(final):.1%}",
            f"{mean(run.mean for run in runs):.1%}",
            ", ".join("-" if step is None else str(step) for step in steps),
            f"{mean(run.seconds for run in runs):.1f}",
            f"{mean(_pass_seconds(run) for run in runs):.1f}",
            f"{mean(run.peak_memory_mb for run in runs) - comparison.start_memory_mb:.0f}",
        )
    return table


def sweep_table(results: Sequence[Result]) -> Table:
    """Mean of the curve and, in brackets, accuracy at the end, by method and learning rate."""
    table = Table(title="mean of the accuracy curve (accuracy at the end), validation problems")
    table.add_column("method")
    learning_rates = sorted({result.lr for result in results})
    for lr in learning_rates:
        table.add_column(f"lr {lr:g}", justify="right")
    for method in METHODS:
        by_lr = {result.lr: result for result in results if result.method == method.key}
        table.add_row(
            method.name,
            *(f"{by_lr[lr].mean:.1%} ({by_lr[lr].final:.1%})" for lr in learning_rates),
        )
    return table


def curves_figure(comparison: Comparison) -> Figure:
    """Accuracy over steps: each method's mean, between its lowest and highest seed."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axis = figure.subplots()
    for method, colour, line in zip(METHODS, _COLOURS, _LINES, strict=True):
        runs = comparison.of(method.key)
        steps = [0, *sorted(runs[0].accuracy)]
        curves = [
            [comparison.student_accuracy, *(run.accuracy[step] for step in steps[1:])]
            for run in runs
        ]
        by_step = list(zip(*curves, strict=True))
        axis.plot(steps, [mean(v) for v in by_step], line, color=colour, label=method.name)
        axis.fill_between(
            steps, [min(v) for v in by_step], [max(v) for v in by_step], color=colour, alpha=0.12
        )
    teacher = comparison.teacher_accuracy
    axis.axhline(teacher, color="black", linewidth=0.8, label="teacher")
    axis.axhline(
        NEAR_TEACHER * teacher,
        color="black",
        linewidth=0.8,
        linestyle=":",
        label=f"{NEAR_TEACHER:.0%} of teacher",
    )
    axis.set(xlabel="optimizer steps", ylabel="held-out problems solved")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    return figure


def _pass_seconds(run: Result) -> float:
    """Teacher pass, student's passes and optimizer, without rollout and weight sync."""
    return sum(run.seconds_by_part[part] for part in ("teacher", "student", "optimizer"))
