"""The comparison's tables."""

from collections.abc import Sequence

from methods import BY_KEY
from plan import PAIRS, Cell
from results import NEAR_TEACHER, Comparison, MethodResult, Reference
from rich.table import Table
from rich.text import Text


def cell_table(comparison: Comparison, cell: Cell) -> Table:
    """One row a method: means over its seeds."""
    reference = comparison.references[cell.pair]
    table = Table(
        title=(
            f"{PAIRS[cell.pair]}, {cell.responses} responses a step: teacher "
            f"{reference.teacher_accuracy:.1%}, {comparison.plan.budget.steps} steps, up to "
            f"{cell.seeds} seeds"
        ),
        caption=(
            f"accuracy: {reference.before.num_problems} problems, with the standard error; steps "
            f"and s: to {NEAR_TEACHER:.0%} of the teacher's accuracy, by seed; cosine, KL and "
            "first token: with the teacher, on the student's own responses"
        ),
    )
    table.add_column("method", no_wrap=True)
    for name in ("lr", "accuracy", "steps", "s", "cosine", "KL", "first token"):
        table.add_column(name, justify="right", no_wrap=True)
    before = reference.before
    table.add_row(
        "student before",
        "",
        f"{before.accuracy:.1%}",
        "",
        "",
        f"{before.cosine:.4f}",
        f"{before.kl:.3f}",
        f"{before.first_token:.1%}",
    )
    for method in comparison.methods_of(cell):
        table.add_row(*_row(method, reference))
    return table


def responses_table(comparison: Comparison, of_pair: Sequence[Cell]) -> Table:
    """Accuracy by method and number of responses, for methods with several numbers."""
    cells = sorted(of_pair, key=lambda cell: cell.responses)
    by_cell = [{m.key: m for m in comparison.methods_of(cell)} for cell in cells]
    table = Table(title=f"{PAIRS[cells[0].pair]}: accuracy (learning rate) by responses a step")
    table.add_column("method", no_wrap=True)
    for cell in cells:
        table.add_column(str(cell.responses), justify="right")
    for key, method in BY_KEY.items():
        found = [methods.get(key) for methods in by_cell]
        if sum(one is not None for one in found) > 1:
            table.add_row(
                method.name,
                *("" if one is None else f"{_accuracy(one)} ({one.lr:g})" for one in found),
            )
    return table


def sweep_table(comparison: Comparison, cell: Cell) -> Table:
    """Accuracy on the validation problems by method and learning rate."""
    table = Table(
        title=f"{PAIRS[cell.pair]}, {cell.responses} responses a step: validation problems"
    )
    table.add_column("method", no_wrap=True)
    for lr in cell.rates:
        table.add_column(f"{lr:g}", justify="right")
    for key, by_lr in comparison.sweep_of(cell).items():
        best = max(by_lr.values())
        texts = [
            Text(f"{by_lr[lr]:.1%}", style="bold" if by_lr[lr] == best else "")
            if lr in by_lr
            else ""
            for lr in cell.rates
        ]
        table.add_row(BY_KEY[key].name, *texts)
    return table


def _row(method: MethodResult, reference: Reference) -> list[str]:
    curves = [result.curve for result in method.runs]
    steps = [curve.steps_to(reference.target) for curve in curves]
    seconds = [
        None if step is None else curve.seconds[step]
        for step, curve in zip(steps, curves, strict=True)
    ]
    return [
        method.name,
        f"{method.lr:g}",
        _accuracy(method),
        ", ".join("-" if step is None else str(step) for step in steps),
        ", ".join("-" if second is None else f"{second:.0f}" for second in seconds),
        f"{method.mean_of('cosine'):.4f}",
        f"{method.mean_of('kl'):.3f}",
        f"{method.mean_of('first_token'):.1%}",
    ]


def _accuracy(method: MethodResult) -> str:
    return f"{method.accuracy:.1%} ± {100 * method.standard_error:.1f}"
