"""Measures a teacher with its weights in FP8 against the same teacher without.

python -m examples.fp8_report.report --teacher TEACHER --prompts heldout.jsonl --output fp8.json

Started with torchrun, the processes share the layers by tensor parallelism.
"""

import argparse
import logging
import os
from pathlib import Path
from typing import get_args

import transformers

from examples.fp8_report.fidelity import measure_fidelity, write_report
from examples.fp8_report.views import bytes_table, fidelity_figure, places_table
from megatron_oprd.config.schema import FP8Recipe, ModelConfig, ParallelConfig, TeacherConfig
from megatron_oprd.console import make_console
from megatron_oprd.errors import UserError, run_entry_point
from megatron_oprd.evaluation.plots import write_picture
from megatron_oprd.parallel.context import parallel_run


def main() -> int:
    """Parses the command line, measures, prints tables, writes the JSON file and the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.fp8_report.report",
        description="Measures a teacher with its weights in FP8 against the same teacher without: "
        "the teacher continues prompts greedily, and both read what it wrote.",
    )
    recipes = [recipe for recipe in get_args(FP8Recipe) if recipe != "delayed"]
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--prompts", type=Path, required=True, nargs="+", metavar="FILE", help=".jsonl or .parquet"
    )
    parser.add_argument(
        "--recipe",
        nargs="+",
        choices=recipes,
        default=[TeacherConfig().fp8_recipe],
        help="teacher.fp8_recipe; several are compared (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="JSON", help="a .png is written beside it"
    )
    parser.add_argument("--params-dtype", choices=("fp32", "bf16"), default="bf16")
    for end in ("start", "end"):
        parser.add_argument(
            f"--num-layers-at-{end}-in-bf16", type=_not_negative, default=0, metavar="N"
        )
    parser.add_argument(
        "--max-new-tokens",
        type=_not_negative,
        default=48,
        metavar="N",
        help="0 continues nothing and compares at the prompts' own tokens (default: %(default)s)",
    )
    parser.add_argument("--max-prompt-tokens", type=_not_negative, default=1024, metavar="N")
    parser.add_argument(
        "--max-tokens",
        type=_not_negative,
        default=4096,
        metavar="N",
        help="tokens of a forward pass; a longer sequence is one by itself (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.output.suffix != ".json":
        raise UserError(f"--output is {args.output}; it must end in .json")

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    parallel = ParallelConfig(tensor_model_parallel_size=int(os.environ.get("WORLD_SIZE", "1")))
    with parallel_run(parallel, seed=0) as context:
        report = measure_fidelity(
            args.teacher,
            args.prompts,
            [
                TeacherConfig(
                    precision="fp8",
                    fp8_recipe=recipe,
                    num_layers_at_start_in_bf16=args.num_layers_at_start_in_bf16,
                    num_layers_at_end_in_bf16=args.num_layers_at_end_in_bf16,
                )
                for recipe in args.recipe
            ],
            model=ModelConfig(params_dtype=args.params_dtype),
            parallel=parallel,
            context=context,
            max_new_tokens=args.max_new_tokens,
            max_prompt_tokens=args.max_prompt_tokens,
            max_tokens=args.max_tokens,
        )
        first = context.rank == 0
    if first:
        picture = args.output.with_suffix(".png")
        write_report(report, args.output)
        write_picture(fidelity_figure(report), picture)
        console = make_console()
        for recipe in report.recipes:
            console.print(places_table(recipe))
        console.print(bytes_table(report))
        console.print(f"wrote {args.output} and {picture}", highlight=False, soft_wrap=True)
    return 0


def _not_negative(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is not 0 or more")
    return number


if __name__ == "__main__":
    run_entry_point(main)
