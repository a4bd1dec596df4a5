import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from megatron_oprd.errors import UserError
from megatron_oprd.evaluation.plots import read_metrics, report_figure, series, write_picture
from megatron_oprd.evaluation.students import Evaluation, StudentResult
from megatron_oprd.evaluation.teacher_forced import TeacherForcedMeasures

pytestmark = pytest.mark.long


def record(step: int, **changes: Any) -> dict[str, Any]:
    """A step as the training loop writes it."""
    return {
        "step": step,
        "loss": 2.0 / step,
        "cosine": 0.9 + 0.001 * step,
        "cosine_per_layer": {str(layer): 0.5 + 0.01 * layer + 0.1 * step for layer in range(12)},
        "grad_norm": 1.5 + 0.1 * step,
        "lr": 1e-4 * step,
        "response_length_mean": 40.0 + step,
        "response_length_max": 48,
        "tokens_per_second": 900.0 + step,
        "rollout_tokens_per_second": 2000.0 - step,
        "peak_memory_gb": 20.0 + 0.5 * step,
        "seconds_rollout": 4.0 + step,
        "seconds_weight_sync": 0.5,
        "seconds_teacher": 1.0,
        "seconds_student": 2.0,
        "seconds_optimizer": 0.25,
        "skipped": False,
    } | changes


def write_lines(file: Path, records: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


def an_evaluation() -> Evaluation:
    def student(name: str, base: float) -> StudentResult:
        cosines = {str(layer): base + 0.01 * layer for layer in range(11)}
        measures = TeacherForcedMeasures(
            num_sequences=2,
            num_positions=20,
            cosine=base,
            cosine_per_layer=cosines,
            top1_agreement=base,
            reverse_kl=1.0,
            forward_kl=2.0,
            student_perplexity=3.0,
            teacher_perplexity=1.5,
        )
        return StudentResult(
            name=name, folder=name, num_layers=11, layer_map=list(range(11)), measures=measures
        )

    return Evaluation(
        teacher="teacher",
        prompts=["held.jsonl"],
        num_prompts=2,
        max_new_tokens=10,
        students=[student("before", 0.5), student("after", 0.8)],
    )


def axis_titled(figure: Figure, start: str) -> Axes:
    (axis,) = (axis for axis in figure.axes if axis.get_title().startswith(start))
    return axis


def drawn(axis: Axes, line: int = 0) -> tuple[list[float], list[float]]:
    points = np.asarray(axis.get_lines()[line].get_xydata(), dtype=float)
    return points[:, 0].tolist(), points[:, 1].tolist()


@pytest.mark.parametrize(
    ("title", "key", "line"),
    [
        ("Loss", "loss", 0),
        ("Cosine on", "cosine", 0),
        ("Gradient norm", "grad_norm", 0),
        ("Learning rate", "lr", 0),
        ("Response length", "response_length_max", 0),
        ("Response length", "response_length_mean", 1),
        ("Throughput", "rollout_tokens_per_second", 0),
        ("Throughput", "tokens_per_second", 1),
        ("Peak memory", "peak_memory_gb", 0),
    ],
)
def test_curves_are_the_metrics(title: str, key: str, line: int) -> None:
    records = [record(step) for step in (1, 2, 3, 5)]
    steps, values = drawn(axis_titled(report_figure(records), title), line)
    assert steps == [1, 2, 3, 5]
    assert values == [r[key] for r in records]


def test_phases_are_stacked() -> None:
    """Each area's upper edge is the sum of its phase and of those below it."""
    records = [record(1), record(2), record(3, seconds_evaluation=10.0)]
    axis = axis_titled(report_figure(records), "Phases")
    legend = axis.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        *("evaluation", "optimizer", "student", "teacher", "weight sync", "responses")
    ]
    upper = [np.asarray(area.get_paths()[0].vertices)[:, 1].max() for area in axis.collections]
    assert upper == pytest.approx([7.0, 7.5, 8.5, 10.5, 10.75, 20.75])


def test_a_run_without_phases_says_so() -> None:
    axis = axis_titled(report_figure([{"step": 1, "loss": 1.0}]), "Phases")
    assert [text.get_text() for text in axis.texts] == ["not recorded"]


def test_what_a_step_lacks_is_a_gap() -> None:
    without = record(3)
    del without["grad_norm"]
    records = [
        record(1),
        record(2, grad_norm=None, skipped=True),
        without,
        record(4, grad_norm=math.inf),
        record(5, grad_norm=math.nan),
        record(6, grad_norm=0.0),
    ]
    _, values = series(records, "grad_norm")
    assert [math.isnan(v) for v in values] == [False, True, True, True, True, False]
    assert values[-1] == 0.0
    figure = report_figure(records)
    _, shown = drawn(axis_titled(figure, "Gradient norm"))
    assert [math.isnan(v) for v in shown] == [False, True, True, True, True, False]
    assert figure.get_suptitle() == "Training, steps 1 to 6 (1 skipped)"


def test_a_curve_nobody_recorded_says_so() -> None:
    axis = axis_titled(report_figure([record(1, lr=None), record(2, lr=None)]), "Learning rate")
    assert not axis.get_lines()
    assert [text.get_text() for text in axis.texts] == ["not recorded"]


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([1.0, 0.1], "log"),
        ([1.0, 0.3], "linear"),
        ([1.0, 0.0], "linear"),
        ([1.0, -0.1], "linear"),
        ([1.0, None, 0.1], "log"),
        ([None, None], "linear"),
    ],
)
def test_logarithmic_where_it_fits(losses: list[float | None], scale: str) -> None:
    records = [record(step, loss=loss) for step, loss in enumerate(losses, start=1)]
    axis = axis_titled(report_figure(records), "Loss")
    assert axis.get_yscale() == scale
    assert axis.get_ylabel() == ("loss (log scale)" if scale == "log" else "loss")


def test_cosine_by_layer_before_and_after() -> None:
    axis = axis_titled(report_figure([record(1)], an_evaluation()), "Cosine by layer")
    for line, base in enumerate((0.5, 0.8)):
        layers, values = drawn(axis, line)
        assert layers == list(range(11))
        assert values == pytest.approx([base + 0.01 * layer for layer in range(11)])
    legend = axis.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["before", "after"]


def test_cosine_by_layer_of_the_training_where_students_have_none() -> None:
    evaluation = an_evaluation()
    students = [
        replace(student, measures=replace(student.measures, cosine=None, cosine_per_layer={}))
        for student in evaluation.students
    ]
    figure = report_figure([record(1)], replace(evaluation, students=students))
    assert drawn(axis_titled(figure, "Cosine by layer"), 0)[0] == list(range(12))


def test_cosine_by_layer_of_the_training_without_an_evaluation() -> None:
    records = [record(1), record(2), record(3), record(4, cosine_per_layer=None)]
    axis = axis_titled(report_figure(records), "Cosine by layer")
    legend = axis.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["step 1", "step 3"]
    layers, values = drawn(axis, line=1)
    assert layers == list(range(12))  # by number: 10 after 9, not after 1
    assert values == list(records[2]["cosine_per_layer"].values())


@pytest.mark.parametrize("num_steps", [1, 200])
def test_the_picture_is_written(tmp_path: Path, num_steps: int) -> None:
    records = [record(step) for step in range(1, num_steps + 1)]
    file = tmp_path / "new" / "report.png"
    write_picture(report_figure(records, an_evaluation()), file)
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50
    with pytest.raises(UserError, match=r"report\.jpg; it must end in \.png"):
        write_picture(report_figure(records), tmp_path / "report.jpg")


def test_metrics_are_read(tmp_path: Path) -> None:
    records = [record(1), record(2, grad_norm=None)]
    assert read_metrics(write_lines(tmp_path / "metrics.jsonl", records)) == records


def test_a_resumed_run_holds_what_it_wrote_last(tmp_path: Path) -> None:
    steps = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (2, 5.0), (3, 5.0)]
    lines = [{"step": step, "loss": loss} for step, loss in steps]
    records = read_metrics(write_lines(tmp_path / "metrics.jsonl", lines))
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 5.0), (3, 5.0)]


def test_a_line_being_written_is_left_out(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "metrics.jsonl", [record(1)])
    with file.open("a") as lines:
        lines.write('{"step": 2, "lo')
    assert read_metrics(file) == [record(1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*No such file"),
        ("", "has no steps"),
        ('{"step": 1}\nloss 3\n', "line 2 of .* is not a JSON object with 'step'"),
        ('{"loss": 1}\n', "line 1 of .* is not a JSON object with 'step'"),
        ("[1, 2]\n", "line 1 of .* is not a JSON object with 'step'"),
    ],
)
def test_mistakes_in_metrics(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "metrics.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_metrics(file)
