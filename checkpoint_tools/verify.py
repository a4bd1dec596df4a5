"""Compares two checkpoints in Hugging Face or Megatron format, or checks a single one.

    python -m checkpoint_tools.verify A
    python -m checkpoint_tools.verify A B --level keys
    python -m checkpoint_tools.verify A B --level bitwise --report report.json
    python -m checkpoint_tools.verify A B --level logits --random 8 --length 64
    torchrun --nproc-per-node 4 -m checkpoint_tools.verify A B --level logits \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

A single folder, written by one of these tools, is compared with its manifest.json: the checksum of
every tensor (in a Megatron checkpoint, of every chunk) is computed again.

Level keys compares names, shapes and dtypes of tensors, config.json's fields and companion files.
Level bitwise also compares the bits of every value. Level logits runs both models in fp32 on the
same tokens and compares every layer's hidden states, the final norm's output and the logits;
transformers runs Hugging Face folders, Megatron runs Megatron checkpoints.

The exit code is 0 without differences, 1 with differences, and 2 for input that cannot be compared:
a folder that is incomplete or has no manifest, and at level logits a model that cannot run, for
example without some tensors (level keys names them) or in a layout that does not divide it. Under
torchrun the exit code is torchrun's own, 1 for both of the latter.
"""

import argparse
import dataclasses
import json
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from checkpoint_tools.common import (
    DTYPES,
    add_layout_arguments,
    check_report_file,
    not_negative,
    positive,
)
from checkpoint_tools.verification import (
    Verdict,
    open_weights,
    verify_files,
    verify_manifest,
    verify_states,
)
from checkpoint_tools.verify_tables import (
    checksums_table,
    keys_table,
    states_table,
    values_table,
)
from megatron_oprd.config.schema import ParallelConfig
from megatron_oprd.console import make_console
from megatron_oprd.errors import UserError, run_entry_point

_CHECKSUMS = "checksums"  # the level of a comparison with the manifest


def read_tokens(path: Path) -> list[list[int]]:
    """Reads sequences of token ids: a JSON list of lists, or a list per line.

    Raises `UserError` if the file is missing or malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        try:
            sequences = json.loads(text)
        except ValueError:
            sequences = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--tokens {path} cannot be read as JSON: {error}.") from error
    if sequences and isinstance(sequences, list) and isinstance(sequences[0], int):
        sequences = [sequences]  # one line
    if not isinstance(sequences, list) or not all(map(_is_sequence, sequences)) or not sequences:
        raise UserError(
            f"--tokens {path} must hold lists of token ids, one a line or in one JSON list."
        )
    return sequences


def random_tokens(count: int, *, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random sequences that each have the vocabulary's first and last token."""
    draw = random.Random(seed)
    # On the edges, errors in splitting or padding the vocabulary show.
    ends = [0, vocab_size - 1][:length]
    return [
        [*ends, *(draw.randrange(vocab_size) for _ in range(length - len(ends)))]
        for _ in range(count)
    ]


def _is_sequence(value: Any) -> bool:
    # type, because isinstance would accept booleans.
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _sequences(args: argparse.Namespace) -> list[list[int]]:
    configs = {path: open_weights(path, args.hf_config).config for path in (args.a, args.b)}
    sizes = [config.get("vocab_size") for config in configs.values()]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) != len(sizes):
        raise UserError(f"config.json of {args.a} or of {args.b} has no vocab_size")
    vocab_size = min(known)
    sequences = None if args.tokens is None else read_tokens(args.tokens)
    longest = args.length if sequences is None else max(map(len, sequences))
    for path, config in configs.items():
        limit = config.get("max_position_embeddings")
        if isinstance(limit, int) and longest > limit:
            asked = f"--length {longest}"
            if sequences is not None:
                asked = f"--tokens {args.tokens} has a sequence of {longest} tokens"
            raise UserError(
                f"{asked}; {path} was made for at most {limit} (max_position_embeddings)."
            )
    if sequences is None:
        return random_tokens(args.random, length=args.length, vocab_size=vocab_size, seed=args.seed)
    highest = max(map(max, sequences))
    if not 0 <= min(map(min, sequences)) <= highest < vocab_size:
        raise UserError(
            f"--tokens {args.tokens} has token ids from {min(map(min, sequences))} to {highest}; "
            f"they have to be 0 to {vocab_size - 1}, the vocabulary's."
        )
    return sequences


def _report(args: argparse.Namespace, verdict: Verdict) -> dict[str, Any]:
    report = {
        "a": str(args.a),
        "b": None if args.b is None else str(args.b),
        "level": args.level,
        "equal": verdict.equal,
        **{name: value for name, value in dataclasses.asdict(verdict).items() if value is not None},
    }
    if verdict.states is None:
        # Without states nothing was compared by it.
        del report["tolerance"]
    else:
        first = verdict.first_state_over
        report["first_over_tolerance"] = None if first is None else first.place
    return report


def _plain(value: Any) -> Any:
    """Replaces NaN and infinity by text, as JSON has neither."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _print(console: Console, args: argparse.Namespace, verdict: Verdict) -> None:
    if verdict.checksums:
        console.print(checksums_table(verdict.checksums))
    if verdict.keys:
        console.print(keys_table(verdict.keys))
    if verdict.values:
        console.print(values_table(verdict.values))
    if verdict.states is not None:
        console.print(states_table(verdict.states, verdict.tolerance))
    if verdict.equal:
        console.print(f"equal at level {args.level}")
        return
    counts = [
        f"{len(found)} differences of {what}"
        for what, found in (
            ("checksums", verdict.checksums),
            ("keys", verdict.keys),
            ("values", verdict.values),
        )
        if found
    ]
    if (first := verdict.first_state_over) is not None:
        counts.append(
            f"{first.place} is the first over the tolerance of {verdict.tolerance:g}: "
            f"{first.relative:.3g} in sequence {first.sequence} at position {first.position}"
        )
    console.print(f"DIFFERENT at level {args.level}: {'; '.join(counts)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_tools.verify",
        description="Compare two checkpoints, each a Hugging Face folder or of Megatron; or one "
        "with the checksums in its manifest.",
    )
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument(
        "b", type=Path, metavar="B", nargs="?", help="without it, A is checked by its manifest"
    )
    parser.add_argument(
        "--level",
        choices=("keys", "bitwise", "logits"),
        help="how two checkpoints are compared (default: bitwise)",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what was found as JSON")
    parser.add_argument(
        "--hf-config",
        type=Path,
        metavar="DIR",
        help="folder with config.json, for Megatron checkpoints that carry none",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="for keys and bitwise: cast both to this before comparing, and let dtypes differ",
    )
    logits = parser.add_argument_group("for the level logits")
    tokens = logits.add_mutually_exclusive_group()
    tokens.add_argument("--tokens", type=Path, metavar="FILE", help="JSON lists of token ids")
    tokens.add_argument(
        "--random", type=positive, default=4, metavar="N", help="random sequences (default: 4)"
    )
    logits.add_argument("--length", type=positive, default=32, help="of these (default: 32)")
    logits.add_argument("--seed", type=int, default=0, help="of these (default: 0)")
    logits.add_argument(
        "--tolerance",
        type=not_negative,
        default=1e-4,
        metavar="X",
        help="largest difference at a position, relative to the largest magnitude there or to 1 "
        "(default: 1e-4)",
    )
    logits.add_argument(
        "--engine",
        choices=("auto", "megatron"),
        default="auto",
        help="megatron also runs Hugging Face folders in Megatron (default: in transformers)",
    )
    add_layout_arguments(logits)
    logits.add_argument("--sequence-parallel", action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; `argv` defaults to the process's arguments."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.b is None and (args.level or args.dtype or args.hf_config):
        parser.error("--level, --dtype and --hf-config are for two checkpoints; give B")
    args.level = _CHECKSUMS if args.b is None else args.level or "bitwise"
    check_report_file("--report", args.report)
    # It would mix with this tool's own progress.
    transformers.utils.logging.disable_progress_bar()
    verdict: Verdict | None
    if args.level == "logits":
        verdict = verify_states(
            args.a,
            args.b,
            _sequences(args),
            tolerance=args.tolerance,
            parallel=ParallelConfig(
                tensor_model_parallel_size=args.tensor_model_parallel_size,
                pipeline_model_parallel_size=args.pipeline_model_parallel_size,
                expert_model_parallel_size=args.expert_model_parallel_size,
                expert_tensor_parallel_size=args.expert_tensor_parallel_size,
                sequence_parallel=args.sequence_parallel,
                # Rank 0 may run transformers while the others wait.
                distributed_timeout_minutes=24 * 60,
            ),
            megatron_only=args.engine == "megatron",
            hf_config=args.hf_config,
        )
    elif int(os.environ.get("RANK", "0")) != 0:
        verdict = None  # a single rank reads the files
    elif args.b is None:
        verdict = verify_manifest(args.a)
    else:
        verdict = verify_files(
            args.a,
            args.b,
            values=args.level == "bitwise",
            dtype=DTYPES[args.dtype] if args.dtype else None,
            hf_config=args.hf_config,
        )
    if verdict is None:
        return 0
    if args.report is not None:
        report = json.dumps(_plain(_report(args, verdict)), indent=2) + "\n"
        args.report.write_text(report, encoding="utf-8")
    _print(make_console(), args, verdict)
    return 0 if verdict.equal else 1


if __name__ == "__main__":
    run_entry_point(main)
