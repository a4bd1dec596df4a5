"""Shared parts of the tools' command lines."""

import argparse
import math
import os
import re
from pathlib import Path

import torch

from megatron_oprd.errors import UserError
from megatron_oprd.parallel.layout import ParallelLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--out`, `--dtype`, `--force` and `--dry-run`."""
    parser.add_argument("--out", type=Path, required=True, help="the folder to create")
    parser.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: as they are)")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint at --out")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written")


# The sizes of the groups that split weights.
LAYOUT_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def add_layout_arguments(group: argparse._ActionsContainer) -> None:
    """Adds the sizes of the groups that split weights, under Megatron's names."""
    for name in ("tensor", "pipeline", "expert"):
        group.add_argument(f"--{name}-model-parallel-size", type=positive, default=1, metavar="N")
    group.add_argument("--expert-tensor-parallel-size", type=positive, metavar="N")


def layout_of(args: argparse.Namespace) -> ParallelLayout:
    """The layout parsed by `add_layout_arguments`."""
    return ParallelLayout(**{name: getattr(args, name) for name in LAYOUT_SIZES})


def positive(text: str) -> int:
    """Parses an integer above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def not_negative(text: str) -> float:
    """Parses a number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number >= 0:  # also refuses NaN
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return number


def check_report_file(setting: str, file: Path | None) -> None:
    """Raises `UserError` if a report cannot be written to ``file``, before the work begins.

    ``setting`` is the option that gave the file, for messages; a ``file`` of None is fine.
    """
    if file is None:
        return
    if file.is_dir():
        raise UserError(f"{setting} {file} is a folder; give a file to write.")
    if not file.parent.is_dir():
        raise UserError(
            f"{setting} {file} cannot be written, because folder {file.parent} does not exist; "
            "make it first."
        )
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"{setting} {file} cannot be written; give a file in another place.")


def num_bytes(text: str) -> int:
    """Parses a size in bytes: 5GB (10^9 bytes each), 500MB, 4GiB (2^30 bytes each)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B)?", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return size
