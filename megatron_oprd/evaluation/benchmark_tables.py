"""The table of an evaluation on benchmarks, for the terminal."""

from rich.table import Table

from megatron_oprd.evaluation.benchmarks import BenchmarkEvaluation
from megatron_oprd.evaluation.sampling_metrics import Estimate, SamplingMetrics, ks


def benchmarks_table(evaluation: BenchmarkEvaluation) -> Table:
    """One section a benchmark, one row a measure, one column a model."""
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
