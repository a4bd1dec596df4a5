"""Converts a Megatron checkpoint (format `torch_dist`) to a Hugging Face folder.

    python -m checkpoint_tools.megatron_to_hf --megatron DIR --out DIR
    torchrun --nproc-per-node 8 -m checkpoint_tools.megatron_to_hf --megatron DIR --out DIR

Accepts the output of hf_to_megatron and of training, and checkpoints of other Megatron runs with
the model's Hugging Face configuration (`--hf-config`). Exports the model's weights only.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools.common import (
    DTYPES,
    add_common_arguments,
    num_bytes,
)
from megatron_oprd.errors import UserError, run_entry_point
from megatron_oprd.models.open_checkpoint import OpenedCheckpoint, open_checkpoint
from megatron_oprd.weights.casting import config_with_dtype, count_overflows, overflow_error
from megatron_oprd.weights.disk import describe_files
from megatron_oprd.weights.distcp_file import AlternatingBuffers
from megatron_oprd.weights.expert_parts import Stacked, has_parts
from megatron_oprd.weights.hf_files import CONFIG_FILE
from megatron_oprd.weights.hf_writer import (
    DEFAULT_MAX_SHARD_SIZE,
    HFContent,
    convert_to_hf_folder,
)
from megatron_oprd.weights.megatron_checkpoint import is_megatron
from megatron_oprd.weights.output_folder import check_output_folder
from megatron_oprd.weights.ranks import Ranks, conversion_ranks
from megatron_oprd.weights.safetensors_file import TensorSpec


def megatron_to_hf(
    megatron: Path,  # the checkpoint, or the folder of a run
    out: Path,
    *,
    hf_config: Path | None = None,  # the model's configuration, if the checkpoint has none
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,  # bytes of tensors per file
    dtype: torch.dtype | None = None,  # None: as they are
    force: bool = False,
    ranks: Ranks | None = None,
) -> Path:
    """Writes a Megatron checkpoint's model as a Hugging Face folder, whole or not at all.

    Dtypes are those before the conversion to Megatron, or else the checkpoint's. Config and
    companion files are those that the checkpoint carries. Returns `out`.

    Raises:
        UserError: The checkpoint is incomplete or of an unsupported format or model, values
            overflow `dtype`, or `out` is taken or cannot be written.
    """
    opened = open_megatron(megatron, hf_config)
    source = opened.source
    content = hf_content(opened, max_shard_size=max_shard_size, dtype=dtype)
    check_output_folder(out, force=force, required_bytes=content.num_bytes, source=megatron)
    # The only check that reads weights, hence the last one.
    opened.check_tied_head()
    # Two buffers suffice: a tensor is written while the next is read.
    buffers = AlternatingBuffers()

    def read(name: str) -> Tensor:
        memory = buffers.empty(source.shape(name), source.dtype(name))
        tensor, stored_as = source.read_slice(name, out=memory), content.tensors[name].dtype
        if count_overflows(tensor, stored_as):
            raise overflow_error(source, name, stored_as)
        return tensor.to(stored_as)

    return convert_to_hf_folder(out, content, read, force=force, ranks=ranks)


def open_megatron(megatron: Path, hf_config: Path | None) -> OpenedCheckpoint:
    """Opens the checkpoint to export; `UserError` if it is not Megatron's or cannot be read."""
    if not is_megatron(megatron):
        found = "is not a Megatron checkpoint" if megatron.exists() else "does not exist"
        raise UserError(
            f"--megatron {megatron} {found}; give the folder with "
            "latest_checkpointed_iteration.txt or the one with .metadata and metadata.json."
        )
    opened = open_checkpoint(megatron, hf_config=hf_config)
    opened.check_tensors()
    # As folders have them, where they have experts stacked.
    source = Stacked(opened.source) if has_parts(opened.table) else opened.source
    return dataclasses.replace(opened, source=source)


def hf_content(
    opened: OpenedCheckpoint, *, max_shard_size: int, dtype: torch.dtype | None
) -> HFContent:
    """The content of the Hugging Face folder; reads no weights."""
    source = opened.source
    return HFContent(
        tensors={
            name: TensorSpec(shape=source.shape(name), dtype=dtype or source.dtype(name))
            for name in source.names()
        },
        config=config_with_dtype(source.config, dtype) or source.hf_folder / CONFIG_FILE,
        companion_files=source.companion_files(),
        origin={
            "tool": "megatron_to_hf",
            "source": describe_files(source.files()),
            "dtype": str(dtype),
        },
        max_shard_size=max_shard_size,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; `argv` defaults to the process's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_tools.megatron_to_hf",
        description="Turn a Megatron checkpoint (torch_dist) into a Hugging Face folder.",
    )
    parser.add_argument("--megatron", type=Path, required=True, help="the checkpoint's folder")
    add_common_arguments(parser)
    parser.add_argument(
        "--hf-config",
        type=Path,
        metavar="DIR",
        help="folder with config.json, tokenizer, ... for a checkpoint that carries none",
    )
    parser.add_argument(
        "--max-shard-size",
        type=num_bytes,
        default=DEFAULT_MAX_SHARD_SIZE,
        metavar="SIZE",
        help="most bytes of tensors in a file (default: 5GB)",
    )
    args = parser.parse_args(argv)
    dtype = DTYPES[args.dtype] if args.dtype else None
    if args.dry_run:
        opened = open_megatron(args.megatron, args.hf_config)
        content = hf_content(opened, max_shard_size=args.max_shard_size, dtype=dtype)
        check_output_folder(
            args.out, force=args.force, required_bytes=content.num_bytes, source=args.megatron
        )
        opened.check_tied_head()
        print(
            f"would write {args.out}: {len(content.tensors)} tensors in {len(content.shards())} "
            f"files, {content.num_bytes} bytes"
        )
        return 0
    with conversion_ranks() as ranks:
        megatron_to_hf(
            args.megatron,
            args.out,
            hf_config=args.hf_config,
            max_shard_size=args.max_shard_size,
            dtype=dtype,
            force=args.force,
            ranks=ranks,
        )
        if ranks.rank == 0:
            print(f"{args.out}: a Hugging Face folder")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
