"""Tables and picture of an FP8 teacher's report."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.table import Table

from examples.fp8_report.fidelity import FINAL_NORM, FidelityReport, RecipeFidelity

# Okabe and Ito's colours, told apart by colour-blind readers; light ones left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "x")
GOAL = 0.999  # cosine in every layer


def bytes_table(report: FidelityReport) -> Table:
    """One row a recipe: what the weights take, and the layer that moved most."""
    table = Table(title="An FP8 teacher against the same one without", caption=_caption(report))
    table.add_column("recipe", no_wrap=True)
    # Two short lines each, so that the table fits 80 columns.
    for title in ("linear\nMB", "of\nbf16", "teacher\nMB", "of\nbf16", "lowest\ncosine", "in"):
        table.add_column(title, justify="right")
    for recipe in report.recipes:
        worst = min(recipe.places, key=lambda place: place.cosine)
        table.add_row(
            recipe.recipe,
            f"{recipe.weights.linear / 1e6:,.1f}",
            f"{recipe.weights.linear / report.bf16.linear:.1%}",
            f"{recipe.weights.whole / 1e6:,.1f}",
            f"{recipe.weights.whole / report.bf16.whole:.1%}",
            f"{worst.cosine:.5f}",
            _place(worst.place),
        )
    return table


def places_table(recipe: RecipeFidelity) -> Table:
    """One row a layer."""
    table = Table(title=f"{recipe.recipe}: hidden states by layer")
    table.add_column("layer", justify="right")
    for title in ("cosine", "lowest\ncosine", "relative\nerror"):
        table.add_column(title, justify="right")
    for place in recipe.places:
        table.add_row(
            place.place,
            f"{place.cosine:.5f}",
            f"{place.lowest_cosine:.5f}",
            f"{place.relative_error:.4f}",
            style=None if place.cosine >= GOAL else "red",
        )
    return table


def fidelity_figure(report: FidelityReport) -> Figure:
    """1 - cosine and relative error by layer, and what the weights take."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(14, 4.6), dpi=120, layout=layout)
    figure.suptitle(f"FP8 teacher {report.teacher}: {_caption(report)}", fontsize=11)
    distance, error, weights = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for axis in (distance, error, weights):
        axis.grid(True, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for number, recipe in enumerate(report.recipes):
        _curve(distance, number, recipe, [1 - place.cosine for place in recipe.places])
        _curve(error, number, recipe, [place.relative_error for place in recipe.places])
    distance.axhline(1 - GOAL, color="gray", linestyle="--", linewidth=1)
    distance.text(0, 1 - GOAL, f" cosine {GOAL}", color="gray", va="bottom", fontsize=8)
    distance.set_yscale("log")
    distance.set_title("1 - cosine of hidden states (mean)")
    error.set_ylim(bottom=0)
    error.set_title("Relative error of hidden states (mean)")
    for axis in (distance, error):
        axis.set_xlabel("layer (from 0); the last is behind the final norm")
        axis.legend(frameon=False, fontsize=8)
    _bars(weights, report)
    return figure


def _curve(axis: Axes, number: int, recipe: RecipeFidelity, values: list[float]) -> None:
    axis.plot(
        range(len(values)),
        values,
        color=_COLOURS[number % len(_COLOURS)],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4,
        linewidth=1.3,
        label=recipe.recipe,
    )


def _bars(axis: Axes, report: FidelityReport) -> None:
    names = ["bf16", *(recipe.recipe for recipe in report.recipes)]
    weights = [report.bf16, *(recipe.weights for recipe in report.recipes)]
    linear = [w.linear / 1e6 for w in weights]
    others = [(w.whole - w.linear) / 1e6 for w in weights]
    rows = range(len(names))
    axis.barh(rows, linear, color=_COLOURS[0], label="linear layers")
    axis.barh(rows, others, left=linear, color="#999999", label="the rest")
    axis.set_yticks(rows, names)
    axis.invert_yaxis()
    axis.set_title("Weights, MB")
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)


def _place(place: str) -> str:
    return place if place == FINAL_NORM else f"layer {place}"


def _caption(report: FidelityReport) -> str:
    caption = (
        f"{report.num_positions} tokens of {report.num_sequences} sequences, computed in "
        f"{report.params_dtype}"
    )
    at_start, at_end = report.num_layers_at_start_in_bf16, report.num_layers_at_end_in_bf16
    if at_start + at_end:
        caption += f"; {at_start} first and {at_end} last layers not FP8"
    return caption
