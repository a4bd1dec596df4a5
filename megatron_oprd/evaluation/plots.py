"""Figure of a training run: curves over steps, and cosine by layer."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_oprd.errors import UserError
from megatron_oprd.evaluation.students import Evaluation

# Okabe and Ito's colours, safe for colour-blind readers, without the light ones.
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_COLOURS = (_ORANGE, _BLUE, _GREEN, _PURPLE)
_MORE_COLOURS = ("#56B4E9", "#999999")
_MARKERS = ("o", "s", "^", "D")
_FEW_STEPS = 60  # up to this many steps are marked with dots

_PHASES = {
    "responses": "seconds_rollout",
    "weight sync": "seconds_weight_sync",
    "teacher": "seconds_teacher",
    "student": "seconds_student",
    "optimizer": "seconds_optimizer",
    "evaluation": "seconds_evaluation",
}

Record = Mapping[str, Any]


def read_metrics(file: Path) -> list[Record]:
    """Reads metrics.jsonl, one JSON object with ``step`` per line, by increasing step.

    Raises UserError if the file is missing, has no record, or has an invalid line.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--metrics: cannot read {file}: {error.strerror}") from error
    records: list[Record] = []
    # An unterminated last line is still being written.
    whole_lines = text[: text.rfind("\n") + 1].splitlines()
    for number, line in enumerate(whole_lines, start=1):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--metrics: line {number} of {file} is not a JSON object with 'step'"
            ) from error
        # A resumed run repeats steps: its records replace those of the abandoned part.
        while records and records[-1]["step"] >= step:
            records.pop()
        records.append(record)
    if not records:
        raise UserError(f"--metrics: {file} has no steps")
    return records


def series(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key; NaN (a gap in the plot) if missing or not finite."""
    steps = [record["step"] for record in records]
    values = [record.get(key) for record in records]
    return steps, [v if v is not None and math.isfinite(v) else math.nan for v in values]


def report_figure(records: Sequence[Record], evaluation: Evaluation | None = None) -> Figure:
    """Plots the metrics of the steps, and cosine by layer.

    The plot by layer shows the students of ``evaluation``. Without an evaluation, or if no student
    has a cosine, it shows the first and last measured step of the training.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(14, 11.2), dpi=120, layout=layout)
    figure.suptitle(_title(records), fontsize=13)
    axes = figure.subplots(3, 3)
    for axis in axes.flat:
        axis.grid(True, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)

    _curve(axes[0, 0], records, "loss", _BLUE)
    _describe(axes[0, 0], "Loss", "loss")
    _log_scale_where_fit(axes[0, 0], records, "loss")

    _curve(axes[0, 1], records, "cosine", _BLUE)
    _describe(axes[0, 1], "Cosine on the student's rollouts", "mean over layers and tokens")

    _layers(axes[0, 2], records, evaluation)

    _curve(axes[1, 0], records, "grad_norm", _BLUE)
    _describe(axes[1, 0], "Gradient norm, before clipping", "L2 norm")
    _log_scale_where_fit(axes[1, 0], records, "grad_norm")

    _curve(axes[1, 1], records, "lr", _BLUE)
    _describe(axes[1, 1], "Learning rate", "learning rate")
    _from_zero(axes[1, 1])
    axes[1, 1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)

    _curve(axes[1, 2], records, "response_length_max", _ORANGE, "longest")
    _curve(axes[1, 2], records, "response_length_mean", _BLUE, "mean")
    _describe(axes[1, 2], "Response length", "tokens")
    _from_zero(axes[1, 2])
    _legend(axes[1, 2])

    _phases(axes[2, 0], records)

    _curve(axes[2, 1], records, "rollout_tokens_per_second", _ORANGE, "of the responses' time")
    _curve(axes[2, 1], records, "tokens_per_second", _BLUE, "of the whole step")
    _describe(axes[2, 1], "Throughput", "tokens per second")
    _from_zero(axes[2, 1])
    _legend(axes[2, 1])

    _curve(axes[2, 2], records, "peak_memory_gb", _BLUE)
    _describe(axes[2, 2], "Peak memory", "GB, of the fullest rank")
    _from_zero(axes[2, 2])
    return figure


def write_picture(figure: Figure, file: Path) -> None:
    """Writes a PNG and creates its folder; raises UserError unless ``file`` ends in .png."""
    if file.suffix != ".png":
        raise UserError(f"--output is {file}; it must end in .png")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _title(records: Sequence[Record]) -> str:
    first, last = records[0]["step"], records[-1]["step"]
    skipped = sum(bool(record.get("skipped")) for record in records)
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"Training, {steps}" + (f" ({skipped} skipped)" if skipped else "")


def _curve(
    axis: Axes, records: Sequence[Record], key: str, colour: str, label: str | None = None
) -> None:
    steps, values = series(records, key)
    if all(math.isnan(value) for value in values):
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color="gray")
        return
    few = len(steps) <= _FEW_STEPS
    axis.plot(
        steps,
        values,
        color=colour,
        label=label,
        linewidth=1.5 if few else 1.1,
        marker="." if few else None,
    )


def _describe(axis: Axes, title: str, unit: str) -> None:
    axis.set_title(title)
    axis.set_ylabel(unit)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10), min_n_ticks=1))


def _phases(axis: Axes, records: Sequence[Record]) -> None:
    """Seconds of each phase, one upon the other."""
    steps = [record["step"] for record in records]
    seconds = {
        name: [0.0 if math.isnan(value) else value for value in series(records, key)[1]]
        for name, key in _PHASES.items()
    }
    if any(any(values) for values in seconds.values()):
        colours = _COLOURS + _MORE_COLOURS
        axis.stackplot(steps, *seconds.values(), labels=list(seconds), colors=colours, alpha=0.8)
        axis.legend(frameon=False, reverse=True)
    else:
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color="gray")
    _describe(axis, "Phases of a step", "seconds")
    _from_zero(axis)


def _legend(axis: Axes) -> None:
    if axis.get_lines():
        axis.legend(frameon=False)


def _from_zero(axis: Axes) -> None:
    axis.margins(y=0.1)
    axis.set_ylim(bottom=0)


def _log_scale_where_fit(axis: Axes, records: Sequence[Record], key: str) -> None:
    """Uses a logarithmic y-axis if all values are positive and differ by more than a factor 4."""
    values = [value for value in series(records, key)[1] if not math.isnan(value)]
    if values and min(values) > 0 and max(values) > 4 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel(f"{axis.get_ylabel()} (log scale)")


def _layers(axis: Axes, records: Sequence[Record], evaluation: Evaluation | None) -> None:
    students = evaluation.students if evaluation else []
    curves = {s.name: s.measures.cosine_per_layer for s in students if s.measures.cosine_per_layer}
    if curves:
        tokens = "the teacher's tokens"
    else:
        tokens = "the rollouts' tokens"
        measured = [r for r in records if r.get("cosine_per_layer")]
        curves = {f"step {r['step']}": r["cosine_per_layer"] for r in measured[:1] + measured[-1:]}
    for index, (label, by_layer) in enumerate(curves.items()):
        # JSON keys are text: '10' would sort before '2'.
        layers = sorted(by_layer, key=int)
        axis.plot(
            [int(layer) for layer in layers],
            [by_layer[layer] for layer in layers],
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            linewidth=1.3,
            label=label,
        )
    _describe(axis, "Cosine by layer", f"mean over {tokens}")
    axis.set_xlabel("student layer (from 0)")
    _legend(axis)
