"""The comparison's pictures."""

from collections.abc import Callable
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from measures import Measures
from methods import BY_KEY
from plan import PAIRS, Cell
from results import NEAR_TEACHER, Comparison, MethodResult

# Okabe and Ito's colours, told apart by colour-blind readers; then again with another line.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
_STYLES: dict[str, dict[str, Any]] = {
    key: {
        "color": _COLOURS[i % len(_COLOURS)],
        "linestyle": _LINES[i // len(_COLOURS)],
    }
    for i, key in enumerate(BY_KEY)
}


def curves_figure(comparison: Comparison, cells: list[Cell]) -> Figure:
    """Accuracy over steps: each method's mean over its seeds, one panel a cell."""
    figure, axes = _panels(len(cells))
    for axis, cell in zip(axes, cells, strict=True):
        reference = comparison.references[cell.pair]
        for method in comparison.methods_of(cell):
            curves = [{0: reference.before_on_curve} | r.curve.accuracy for r in method.runs]
            steps = sorted(curves[0])
            values = [mean(curve[step] for curve in curves) for step in steps]
            axis.plot(steps, values, label=method.name, **_STYLES[method.key])
        axis.axhline(
            reference.target,
            color="grey",
            linewidth=0.8,
            linestyle=":",
            label=f"{NEAR_TEACHER:.0%} of the teacher",
        )
        axis.set(xlabel="optimizer steps", title=f"{PAIRS[cell.pair]}, {cell.responses} a step")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].set(ylabel="problems solved")
    # The first cell has all methods.
    _legend(axes[-1], of=axes[0])
    return figure


def responses_figure(comparison: Comparison, cells: list[Cell]) -> Figure:
    """Accuracy at the end with its standard error, over the responses of a step."""
    figure, axes = _panels(1)
    axis = axes[0]
    by_key: dict[str, list[tuple[int, MethodResult]]] = {}
    for cell in sorted(cells, key=lambda cell: cell.responses):
        for method in comparison.methods_of(cell):
            by_key.setdefault(method.key, []).append((cell.responses, method))
    for key, points in by_key.items():
        if len(points) > 1:
            axis.errorbar(
                [responses for responses, _ in points],
                [method.accuracy for _, method in points],
                yerr=[method.standard_error for _, method in points],
                capsize=3,
                label=points[0][1].name,
                **_STYLES[key],
            )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set(xlabel="responses a step", ylabel="problems solved", title=PAIRS[cells[0].pair])
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axis, of=axis)
    return figure


def positions_figure(comparison: Comparison, cell: Cell) -> Figure:
    """KL and cosine by position of the response's token, means over the seeds."""
    figure, axes = _panels(2)
    before = comparison.references[cell.pair].before
    reads: list[tuple[str, Callable[[Measures], list[float | None]]]] = [
        ("KL(student || teacher), nats", lambda measures: measures.kl_by_position),
        ("1 - cosine of hidden states", lambda measures: _distances(measures)),
    ]
    for axis, (name, read) in zip(axes, reads, strict=True):
        _by_position(axis, [read(before)], label="student before", color="grey", linestyle=":")
        for method in comparison.methods_of(cell):
            values = [read(result.measures) for result in method.runs]
            _by_position(axis, values, label=method.name, **_STYLES[method.key])
        axis.set(xlabel="token of the response", ylabel=name, yscale="log")
    figure.suptitle(f"{PAIRS[cell.pair]}, {cell.responses} responses a step")
    _legend(axes[-1], of=axes[-1])
    return figure


def _distances(measures: Measures) -> list[float | None]:
    return [None if value is None else 1 - value for value in measures.cosine_by_position]


def _by_position(
    axis: Axes, runs: list[list[float | None]], *, label: str, color: str, linestyle: str
) -> None:
    """Draws the positions at which every run has a value."""
    points = []
    for position, values in enumerate(zip(*runs, strict=True)):
        numbers = [value for value in values if value is not None]
        if len(numbers) == len(values):
            points.append((position + 1, mean(numbers)))
    positions, means = zip(*points, strict=True)
    axis.plot(positions, means, label=label, color=color, linestyle=linestyle)


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5 * number + 3, 5), dpi=120, layout="constrained")
    axes = list(figure.subplots(1, number, sharey=False, squeeze=False)[0])
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _legend(axis: Axes, *, of: Axes) -> None:
    """Names the lines ``of`` one panel to the right of another."""
    lines, names = of.get_legend_handles_labels()
    axis.legend(lines, names, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small")
