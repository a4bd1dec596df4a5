"""Turns a Megatron checkpoint (format `torch_dist`) into a Hugging Face folder.

    python -m checkpoint_tools.megatron_to_hf --megatron DIR --out DIR
    torchrun --nproc-per-node 8 -m checkpoint_tools.megatron_to_hf --megatron DIR --out DIR

Takes what hf_to_megatron and training write, and checkpoints of other Megatron runs together with
the model's Hugging Face configuration (`--hf-config`). Only the model's weights are exported.
"""

import argparse
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
    megatron: Path,
    out: Path,
    *,
    hf_config: Path | None = None,
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    dtype: torch.dtype | None = None,
    force: bool = False,
    ranks: Ranks | None = None,
) -> Path:
    """Writes the model of a Megatron checkpoint as the Hugging Face folder `out`.

    Names are the model's own, dtypes those that the model had before it was converted to Megatron,
    or else the checkpoint's. Config and companion files are those that the checkpoint carries.

    Args:
        megatron: The checkpoint, or the folder of a run with checkpoints.
        out: The folder to create; it appears when it is whole.
        hf_config: For a checkpoint that carries none: a folder with the model's configuration.
        max_shard_size: The most bytes of tensors in one safetensors file.
        dtype: What the weights are cast to; None leaves each as it is.
        force: Whether a checkpoint that is at `out` is replaced.
        ranks: The processes that share the work.

    Returns:
        `out`.

    Raises:
        UserError: If the checkpoint is of no supported format or model, is not whole, or has values
            that are too large for `dtype`, or `out` is taken or cannot be written.
    """
    opened = open_megatron(megatron, hf_config)
    source = opened.source
    content = hf_content(opened, max_shard_size=max_shard_size, dtype=dtype)
    check_output_folder(out, force=force, required_bytes=content.num_bytes, source=megatron)
    opened.check_tied_head()
    buffers = AlternatingBuffers()

    def read(name: str) -> Tensor:
        memory = buffers.empty(source.shape(name), source.dtype(name))
        tensor, stored_as = source.read_slice(name, out=memory), content.tensors[name].dtype
        if count_overflows(tensor, stored_as):
            raise overflow_error(source, name, stored_as)
        return tensor.to(stored_as)

    return convert_to_hf_folder(out, content, read, force=force, ranks=ranks)


def open_megatron(megatron: Path, hf_config: Path | None) -> OpenedCheckpoint:
    """Opens the checkpoint to export.

    Raises:
        UserError: It is none of Megatron's, or cannot be read.
    """
    if not is_megatron(megatron):
        found = "exists" if megatron.exists() else "does not exist"
        raise UserError(
            f"--megatron {megatron}: it {found} and is no Megatron checkpoint; give the folder "
            "with latest_checkpointed_iteration.txt or the one with .metadata and metadata.json."
        )
    opened = open_checkpoint(megatron, hf_config=hf_config)
    opened.check_tensors()
    return opened


def hf_content(
    opened: OpenedCheckpoint, *, max_shard_size: int, dtype: torch.dtype | None
) -> HFContent:
    """What the Hugging Face folder gets; no weight is read."""
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
    """Runs the tool with the arguments `argv` (the process's by default)."""
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
