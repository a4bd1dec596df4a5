"""Converts a Hugging Face model to a Megatron checkpoint (format `torch_dist`).

    python -m checkpoint_tools.hf_to_megatron --hf DIR --out DIR
    torchrun --nproc-per-node 8 -m checkpoint_tools.hf_to_megatron --hf DIR --out DIR

Any Megatron layout can load the result; the given layout loads whole chunks. Megatron-LM's `--load`
takes the folder, which also has the model's config and tokenizer.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint_tools.common import (
    DTYPES,
    LAYOUT_SIZES,
    add_common_arguments,
    add_layout_arguments,
    layout_of,
    positive,
)
from megatron_oprd.errors import run_entry_point
from megatron_oprd.models.families import mapping_table
from megatron_oprd.models.layout_checks import check_layout
from megatron_oprd.models.open_checkpoint import OpenedCheckpoint, open_checkpoint
from megatron_oprd.weights.accounting import EMBEDDING, HEAD, is_derived
from megatron_oprd.weights.casting import config_with_dtype
from megatron_oprd.weights.disk import describe_files
from megatron_oprd.weights.megatron_checkpoint import SourceTensors
from megatron_oprd.weights.output_folder import check_output_folder
from megatron_oprd.weights.ranks import Ranks, conversion_ranks
from megatron_oprd.weights.torch_dist_plan import ParallelLayout, plan_files
from megatron_oprd.weights.torch_dist_writer import TorchDistContent, convert_to_torch_dist


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a conversion that determine its result."""

    # Its ranks load whole chunks.
    layout: ParallelLayout = dataclasses.field(default_factory=ParallelLayout)
    # As in Megatron, the embedding is zero-padded to a multiple of this times the tensor-parallel
    # size.
    make_vocab_size_divisible_by: int = 128
    # None keeps the dtypes, except that tensors which Megatron joins take the widest of theirs.
    dtype: torch.dtype | None = None


def hf_to_megatron(
    hf: Path, out: Path, settings: Settings, *, force: bool = False, ranks: Ranks | None = None
) -> Path:
    """Writes a model as the Megatron checkpoint `out`, whole or not at all; returns `out`.

    `hf` is a Hugging Face folder, or a Megatron checkpoint that carries its configuration.

    Raises:
        UserError: The model is not supported or cannot be read, the layout does not fit it, its
            values overflow the dtype, or `out` is taken or cannot be written.
    """
    opened = open_checkpoint(hf)
    content = megatron_content(opened, settings)
    check_output_folder(out, force=force, required_bytes=content.num_bytes, source=hf)
    # The only check that reads weights, hence the last one.
    opened.check_tied_head()
    return convert_to_torch_dist(out, opened.source, content, force=force, ranks=ranks)


def megatron_content(opened: OpenedCheckpoint, settings: Settings) -> TorchDistContent:
    """The content of the Megatron checkpoint; reads no weights.

    Raises `UserError` if the tensors do not match the configuration, or the layout does not fit.
    """
    source, layout = opened.source, settings.layout
    check_layout(opened.architecture, layout, model=str(source.folder))
    opened.check_tensors()
    multiple = settings.make_vocab_size_divisible_by * layout.tensor_model_parallel_size
    padded = opened.architecture.padded_vocab_size(multiple)
    table = mapping_table(opened.architecture, padded_vocab_size=padded)
    hf_dtypes = {
        name: settings.dtype or source.dtype(name)
        for name in source.names()
        if not is_derived(name)
    }
    dtypes = {}
    for mapping in table:
        first, *others = (hf_dtypes[name] for name in mapping.hf)
        for other in others:
            first = torch.promote_types(first, other)
        dtypes[mapping.megatron] = first
    # A stored copy of a tied head is noted, so that the way back can restore it.
    stored_twice = opened.architecture.tied and HEAD in hf_dtypes
    tensors = SourceTensors(dtypes=hf_dtypes, copies={HEAD: EMBEDDING} if stored_twice else {})
    return TorchDistContent(
        files=plan_files(table, layout=layout, dtypes=dtypes),
        config=config_with_dtype(source.config, settings.dtype),
        origin={
            "tool": "hf_to_megatron",
            "source": describe_files(source.files()),
            # Only what decides the chunks.
            "layout": {name: getattr(layout, name) for name in LAYOUT_SIZES},
            "dtype": str(settings.dtype),
            "padded_vocab_size": padded,
            **tensors.as_json(),
        },
    )


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(
        layout=layout_of(args),
        make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
        dtype=DTYPES[args.dtype] if args.dtype else None,
    )


def _describe(content: TorchDistContent) -> str:
    chunks = [chunk for file in content.files for chunk in file.chunks]
    keys = {chunk.key: chunk for chunk in chunks}
    lines = [
        f"{key} {list(chunk.global_shape)} {str(chunk.dtype).removeprefix('torch.')}"
        for key, chunk in keys.items()
    ]
    lines.append(
        f"{len(keys)} tensors in {len(chunks)} chunks and {len(content.files)} files, "
        f"{sum(chunk.num_bytes for chunk in chunks)} bytes"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; `argv` defaults to the process's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_tools.hf_to_megatron",
        description="Turn a Hugging Face model into a Megatron checkpoint (torch_dist).",
    )
    parser.add_argument(
        "--hf",
        type=Path,
        required=True,
        help="the model's folder (a Megatron checkpoint is cut anew)",
    )
    add_common_arguments(parser)
    layout = parser.add_argument_group("the layout that is to load whole chunks (any layout can)")
    add_layout_arguments(layout)
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=positive,
        default=128,
        metavar="N",
        help="rows of the embedding are padded to a multiple of this times the tensor-parallel "
        "size (default: 128)",
    )
    args = parser.parse_args(argv)
    settings = _settings(args)
    if args.dry_run:
        opened = open_checkpoint(args.hf)
        content = megatron_content(opened, settings)
        check_output_folder(
            args.out, force=args.force, required_bytes=content.num_bytes, source=args.hf
        )
        opened.check_tied_head()
        print(f"{_describe(content)}\nwould write {args.out}")
        return 0
    # Every rank reads the configuration and headers for itself, then converts its share of the
    # files.
    with conversion_ranks() as ranks:
        hf_to_megatron(args.hf, args.out, settings, force=args.force, ranks=ranks)
        if ranks.rank == 0:
            print(f"{args.out}: a torch_dist checkpoint; Megatron-LM takes it with --load")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
