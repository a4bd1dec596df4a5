"""Terminal tables of evaluations."""

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from megatron_oprd.evaluation.benchmarks import BenchmarkEvaluation
from megatron_oprd.evaluation.sampling_metrics import Estimate, SamplingMetrics, ks
from megatron_oprd.evaluation.students import Evaluation
from megatron_oprd.evaluation.teacher_forced import TeacherForcedMeasures


@dataclass(frozen=True)
class _Measure:
    """How a field of `TeacherForcedMeasures` is displayed."""

    field: str
    title: str
    unit: str
    number: str  # format specification
    more_is_better: bool

    def of(self, measures: TeacherForcedMeasures) -> float | None:
        return getattr(measures, self.field)

    def shown(self, measures: TeacherForcedMeasures) -> str:
        value = self.of(measures)
        return "-" if value is None else format(value, self.number)


_MEASURES = (
    _Measure("cosine", "mean cosine", "", ".4f", True),
    _Measure("top1_agreement", "top-1 agreement", "", ".1%", True),
    _Measure("reverse_kl", "reverse KL", "nats", ".4f", False),
    _Measure("forward_kl", "forward KL", "nats", ".4f", False),
    _Measure("student_perplexity", "perplexity", "", ".3f", False),
)


def students_table(evaluation: Evaluation) -> Table:
    """Table with a row per student and a column per metric."""
    table = Table(title="Students against the teacher", caption=_caption(evaluation))
    table.add_column("student")
    table.add_column("layers", justify="right")
    for measure in _MEASURES:
        # Column titles in two lines, so that the table fits into 80 columns.
        title = measure.title.replace(" ", "\n", 1)
        table.add_column(f"{title}, {measure.unit}" if measure.unit else title, justify="right")
    for student in evaluation.students:
        values = [measure.shown(student.measures) for measure in _MEASURES]
        table.add_row(student.name, str(student.num_layers), *values)
    return table


def changes_table(evaluation: Evaluation) -> Table:
    """Table with a row per metric, a column per student, and the change from first to last."""
    table = Table(title="Before and after", caption=_caption(evaluation))
    table.add_column("measure")
    for student in evaluation.students:
        table.add_column(student.name, justify="right")
    table.add_column("change", justify="right")
    for measure in _MEASURES:
        of = [student.measures for student in evaluation.students]
        first, last = measure.of(of[0]), measure.of(of[-1])
        table.add_row(
            f"{measure.title}, {measure.unit}" if measure.unit else measure.title,
            *map(measure.shown, of),
            "-" if first is None or last is None else _change(measure, last - first),
        )
    return table


def _change(measure: _Measure, change: float) -> Text:
    shown = format(change, "+" + measure.number)
    # A change that rounds to zero is neither better nor worse.
    if not any(digit in shown for digit in "123456789"):
        return Text("none")
    better = (change > 0) == measure.more_is_better
    return Text(f"{shown} {'better' if better else 'worse'}", style="green" if better else "red")


def _caption(evaluation: Evaluation) -> str:
    measures = evaluation.students[0].measures
    return (
        f"{evaluation.num_prompts} prompts, {measures.num_positions} tokens by the teacher; "
        f"its own perplexity: {measures.teacher_perplexity:.3f}"
    )


def benchmarks_table(evaluation: BenchmarkEvaluation) -> Table:
    """Table with a section per benchmark, a row per metric and a column per model."""
    sampling = evaluation.settings.sampling
    table = Table(
        title="Benchmarks",
        caption=f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, at most "
        f"{sampling.max_new_tokens} tokens; in brackets: 95% bootstrap interval over problems",
    )
    table.add_column("benchmark")
    table.add_column("measure")
    for model in evaluation.models:
        table.add_column(model, justify="right")
    for benchmark, numbers in evaluation.benchmarks.items():
        of_models = [_rows(evaluation.results[model][benchmark]) for model in evaluation.models]
        first = [benchmark, f"{numbers['num_problems']} problems"]
        for position, measure in enumerate(of_models[0]):
            table.add_row(
                first[position] if position < len(first) else "",
                measure,
                *(rows[measure] for rows in of_models),
            )
        table.add_section()
    return table


def _rows(metrics: SamplingMetrics) -> dict[str, str]:
    return {
        f"Avg@{metrics.n}": _percent(metrics.avg),
        f"Best@{metrics.n}": _percent(metrics.best),
        # pass@1 is Avg@n, and pass@n is Best@n.
        **{f"pass@{k}": _percent(metrics.pass_at[k]) for k in ks(metrics.n) if 1 < k < metrics.n},
        "Dist-4g": f"{metrics.dist_4:.3f}",
        "mean length, tokens": f"{metrics.mean_length:.1f}",
        "cut off": f"{metrics.cut_share:.1%}",
        "no answer": f"{metrics.no_answer_share:.1%}",
        "grading given up": str(metrics.num_timed_out),
    }


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"
