"""Measures models: by responses to benchmarks, or students against their teacher.

On benchmarks, with answers that are sampled and graded:

python -m megatron_oprd.evaluate --model student=DIR teacher=DIR --data math-500.parquet \
    --n 16 --temperature 0.7 --top-p 0.95 --output DIR

Against the teacher, on its greedy continuations of held-out prompts (the cosine of hidden states
needs students as wide as the teacher):

python -m megatron_oprd.evaluate --teacher TEACHER --student before=PRUNED after=TRAINED \
    --prompts heldout.jsonl --output eval.json
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_oprd.config.engines import EngineConfig
from megatron_oprd.config.urls import check_url
from megatron_oprd.console import make_console
from megatron_oprd.data.benchmarks import load_benchmarks
from megatron_oprd.data.chat import ChatFormat
from megatron_oprd.errors import UserError, run_entry_point
from megatron_oprd.evaluation.benchmarks import (
    GenerationSettings,
    evaluate_on_benchmarks,
    write_benchmark_evaluation,
)
from megatron_oprd.evaluation.students import evaluate_students, write_evaluation
from megatron_oprd.evaluation.tables import benchmarks_table, students_table
from megatron_oprd.rollout.engine import SamplingParams
from megatron_oprd.rollout.kind import EngineKind
from megatron_oprd.rollout.registry import ENGINES

BENCHMARK_OPTIONS: dict[str, Any] = {
    "data": None,
    "n": 16,
    "temperature": 0.7,
    "top_p": 0.95,
    "top_k": 0,
    "stop": [],
    "seed": 1234,
    "limit": None,
    "instruction": None,
    "engine": EngineConfig().engine,
    "tensor_model_parallel_size": 1,
    "server_url": None,
    "max_new_tokens": 4096,
    "batch_size": 32,
}
TEACHER_FORCED_OPTIONS: dict[str, Any] = {
    "teacher": None,
    "student": None,
    "prompts": None,
    "max_new_tokens": 48,
    "max_prompt_tokens": 1024,
    "batch_size": 8,
}


def main() -> int:
    """Parses the command line, evaluates, prints the table and writes the JSON file."""
    args = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    if args.model is None:
        _fill(args, TEACHER_FORCED_OPTIONS, BENCHMARK_OPTIONS, needs="--model")
        return _against_teacher(args)
    _fill(args, BENCHMARK_OPTIONS, TEACHER_FORCED_OPTIONS, needs="--teacher")
    return _on_benchmarks(args)


def _parser() -> argparse.ArgumentParser:
    splitting = _engines(lambda kind: kind.splits_models)
    serving = _engines(lambda kind: kind.has_servers)
    parser = argparse.ArgumentParser(
        prog="python -m megatron_oprd.evaluate",
        description="Measures models: --model and --data sample answers to benchmarks and grade "
        "them; --teacher, --student and --prompts compare students with their teacher on "
        "continuations that it writes greedily.",
    )
    benchmarks = parser.add_argument_group("on benchmarks")
    _add_models(benchmarks, "--model", "a Hugging Face folder or a Megatron checkpoint")
    benchmarks.add_argument(
        "--data", type=Path, nargs="+", action="extend", metavar="FILE",
        help=".parquet or .jsonl with the columns prompt and reward_model.ground_truth",
    )  # fmt: skip
    defaults = BENCHMARK_OPTIONS
    benchmarks.add_argument(
        "--n", type=_positive, help=f"responses for each problem, default: {defaults['n']}"
    )
    benchmarks.add_argument(
        "--temperature", type=float, help=f"default: {defaults['temperature']}; 0 is greedy"
    )
    benchmarks.add_argument("--top-p", type=float, help=f"default: {defaults['top_p']}")
    benchmarks.add_argument("--top-k", type=int, help="default: off")
    benchmarks.add_argument(
        "--stop", nargs="+", action="extend", metavar="TEXT", help="texts that end a response"
    )
    benchmarks.add_argument("--seed", type=int, help=f"default: {defaults['seed']}")
    benchmarks.add_argument(
        "--limit", type=_positive, metavar="N", help="the first N problems of each file only"
    )
    benchmarks.add_argument(
        "--instruction", metavar="TEXT", help="is put behind each problem; default: nothing"
    )
    benchmarks.add_argument(
        "--engine",
        choices=list(ENGINES),
        help=f"what generates, default: {defaults['engine']}",
    )
    benchmarks.add_argument(
        "--tensor-model-parallel-size",
        type=_positive,
        metavar="N",
        help=f"with --engine {splitting}: GPUs that a model is split over, from --device on; "
        "default: 1",
    )
    benchmarks.add_argument(
        "--server-url",
        metavar="URL",
        help=f"a server of --engine {serving}, as in its setting servers in training, "
        "that gets the weights of each --model in turn; default: none, the engine is "
        "started here",
    )
    teacher = parser.add_argument_group("against the teacher")
    teacher.add_argument("--teacher", type=Path, metavar="DIR")
    _add_models(teacher, "--student", "a Hugging Face model folder")
    teacher.add_argument(
        "--prompts", type=Path, nargs="+", metavar="FILE", help=".jsonl or .parquet"
    )
    teacher.add_argument("--max-prompt-tokens", type=_positive, metavar="N", help="default: 1024")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="on benchmarks a folder: samples and evaluation.json; else the JSON file",
    )
    for option in ("max_new_tokens", "batch_size"):
        parser.add_argument(
            f"--{option.replace('_', '-')}",
            type=_positive,
            metavar="N",
            help=f"default: {BENCHMARK_OPTIONS[option]} on benchmarks, "
            f"{TEACHER_FORCED_OPTIONS[option]} against the teacher",
        )
    parser.add_argument(
        "--chat-template-kwargs",
        type=_json_object,
        default={},
        metavar="JSON",
        help='what chat templates are given, such as {"enable_thinking": false}',
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    return parser


def _engines(can: Callable[[EngineKind], bool]) -> str:
    """The names of the engines with a capability."""
    return " or ".join(name for name, kind in ENGINES.items() if can(kind))


def _add_models(group: argparse._ArgumentGroup, option: str, kind: str) -> None:
    group.add_argument(
        option,
        nargs="+",
        action="extend",
        metavar="[NAME=]DIR",
        help=f"{kind}, named after the folder unless NAME is given; several are compared in this "
        "order",
    )


def _fill(
    args: argparse.Namespace,
    own: dict[str, Any],
    others: dict[str, Any],
    *,
    needs: str,
) -> None:
    """Sets missing options to their defaults, and rejects options of the other mode."""
    for name in others.keys() - own.keys():
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} has no effect without {needs}; leave it out"
            )
    for name, default in own.items():
        # Defaults are set here, not by argparse, which would not tell them from given values.
        if getattr(args, name) is None:
            setattr(args, name, default)
    for name in ("data", "teacher", "student", "prompts"):
        if name in own and getattr(args, name) is None:
            raise UserError(
                f"--{name} is not given; benchmarks need --model and --data, a comparison with "
                "the teacher --teacher, --student and --prompts"
            )


def _on_benchmarks(args: argparse.Namespace) -> int:
    _check_generation(args)
    evaluation = evaluate_on_benchmarks(
        _named_folders(args.model, "--model"),
        load_benchmarks(args.data, limit=args.limit, instruction=args.instruction),
        GenerationSettings(
            engine=args.engine,
            sampling=SamplingParams(
                temperature=args.temperature,
                top_p=args.top_p,
                top_k=args.top_k,
                stop=tuple(args.stop),
                max_new_tokens=args.max_new_tokens,
                samples_per_prompt=args.n,
                seed=args.seed,
            ),
            dtype=args.dtype,
            batch_size=args.batch_size,
            chat_template_kwargs=args.chat_template_kwargs,
        ),
        args.output,
        device=torch.device(args.device),
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        server_url=args.server_url,
    )
    write_benchmark_evaluation(evaluation, args.output / "evaluation.json")
    make_console().print(benchmarks_table(evaluation))
    return 0


# Not in config/: options of this command, which has no run. Messages name the options.
def _check_generation(args: argparse.Namespace) -> None:
    """Refuses options that no engine takes, or not the one that is asked for."""
    if not args.temperature >= 0:
        raise UserError(f"--temperature {args.temperature} is out of range; it has to be 0 or more")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p} is out of range; it has to be above 0 and at most 1")
    if args.top_k < 0:
        raise UserError(f"--top-k {args.top_k} is out of range; it has to be 0 (off) or more")
    if "" in args.stop:
        raise UserError("--stop has an empty text, which would end every response; remove it")
    kind = ENGINES[args.engine]
    if args.tensor_model_parallel_size != 1 and (not kind.splits_models or args.server_url):
        raise UserError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} needs --engine "
            f"{_engines(lambda kind: kind.splits_models)} without --server-url"
        )
    if args.server_url is not None:
        if not kind.has_servers:
            raise UserError(
                f"--server-url has no effect with --engine {args.engine}; leave it out, or give "
                f"--engine {_engines(lambda kind: kind.has_servers)}"
            )
        check_url(args.server_url, "--server-url")
    if kind.max_temperature is not None and args.temperature > kind.max_temperature:
        raise UserError(
            f"--temperature {args.temperature} is out of range; {kind.title} takes at most "
            f"{kind.max_temperature}"
        )


def _against_teacher(args: argparse.Namespace) -> int:
    evaluation = evaluate_students(
        args.teacher,
        _named_folders(args.student, "--student"),
        args.prompts,
        max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        chat=ChatFormat(kwargs=args.chat_template_kwargs),
        batch_size=args.batch_size,
        dtype=getattr(torch, args.dtype),
        device=torch.device(args.device),
    )
    write_evaluation(evaluation, args.output)
    make_console().print(students_table(evaluation))
    return 0


def _named_folders(models: list[str], option: str) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for text in models:
        name, separator, folder = text.partition("=")
        named = separator and "/" not in name
        path = Path(folder if named else text)
        name = name if named else path.absolute().name
        if name in folders:
            raise UserError(
                f"{option} names two models {name!r}; give each a name of its own, as NAME=DIR"
            )
        folders[name] = path
    return folders


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


if __name__ == "__main__":
    run_entry_point(main)
