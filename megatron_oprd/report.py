"""Draws a training run's curves, and the evaluation before and after it.

python -m megatron_oprd.report --metrics RUN/metrics.jsonl --evaluation eval.json \
    --output RUN/report.png
"""

import argparse
from pathlib import Path

from megatron_oprd.console import make_console
from megatron_oprd.errors import run_entry_point
from megatron_oprd.evaluation.plots import read_metrics, report_figure, write_picture
from megatron_oprd.evaluation.students import read_evaluation
from megatron_oprd.evaluation.tables import changes_table


def main() -> int:
    """Parses the command line, writes the picture and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_oprd.report",
        description="Draws a training run's curves into a PNG, and prints the measures before and "
        "after it.",
    )
    parser.add_argument("--metrics", type=Path, required=True, metavar="RUN/metrics.jsonl")
    parser.add_argument(
        "--evaluation", type=Path, metavar="JSON", help="what megatron_oprd.evaluate wrote"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    args = parser.parse_args()

    records = read_metrics(args.metrics)
    evaluation = read_evaluation(args.evaluation) if args.evaluation else None
    write_picture(report_figure(records, evaluation), args.output)
    console = make_console()
    if evaluation is not None:
        console.print(changes_table(evaluation))
    console.print(f"wrote {args.output}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
