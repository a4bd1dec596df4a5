"""Measures students against their teacher on held-out prompts.

python -m megatron_oprd.evaluate --teacher TEACHER --student before=PRUNED after=TRAINED \
    --prompts heldout.jsonl --output eval.json
"""

import argparse
import logging
from pathlib import Path

import torch
import transformers
from rich.console import Console

from megatron_oprd.errors import UserError, run_entry_point
from megatron_oprd.evaluation.students import evaluate_students, write_evaluation
from megatron_oprd.evaluation.tables import students_table


def main() -> int:
    """Parses the command line, evaluates, prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_oprd.evaluate",
        description="Measures students against their teacher: the teacher continues held-out "
        "prompts greedily, and both are compared on what it wrote.",
    )
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--student",
        required=True,
        nargs="+",
        action="extend",
        metavar="[NAME=]DIR",
        help="a Hugging Face model folder, named after the folder unless NAME is given; several "
        "are compared in this order",
    )
    parser.add_argument(
        "--prompts", type=Path, required=True, nargs="+", metavar="FILE", help=".jsonl or .parquet"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="JSON")
    parser.add_argument("--max-new-tokens", type=_positive, default=48, metavar="N")
    parser.add_argument("--max-prompt-tokens", type=_positive, default=1024, metavar="N")
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    args = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    evaluation = evaluate_students(
        args.teacher,
        _named_folders(args.student),
        args.prompts,
        max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        batch_size=args.batch_size,
        dtype=getattr(torch, args.dtype),
        device=torch.device(args.device),
    )
    write_evaluation(evaluation, args.output)
    Console().print(students_table(evaluation))
    return 0


def _named_folders(students: list[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for text in students:
        name, separator, folder = text.partition("=")
        named = separator and "/" not in name
        path = Path(folder if named else text)
        name = name if named else path.absolute().name
        if name in folders:
            raise UserError(f"--student: two students are called {name!r}; give NAME=DIR")
        folders[name] = path
    return folders


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


if __name__ == "__main__":
    run_entry_point(main)
