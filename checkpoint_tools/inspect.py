"""Shows a checkpoint's architecture, parameters and tensors, and how a layout divides it.

    python -m checkpoint_tools.inspect DIR
    python -m checkpoint_tools.inspect DIR --tensor-model-parallel-size 8 \
        --pipeline-model-parallel-size 4 --tensors --json FILE

DIR is a Hugging Face folder or a Megatron checkpoint. No weights are read.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoint_tools.common import add_layout_arguments, check_report_file, layout_of, positive
from checkpoint_tools.inspection import (
    Part,
    Share,
    TensorGroup,
    parts,
    ranges,
    shares,
    tensor_groups,
)
from checkpoint_tools.obstacles import Obstacles, find_obstacles
from checkpoint_tools.verification import open_weights
from megatron_oprd.console import make_console
from megatron_oprd.errors import UserError, run_entry_point
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.build import padded_vocab_size
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights.casting import dtype_name
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.megatron_checkpoint import is_megatron
from megatron_oprd.weights.output_folder import MANIFEST_FILE
from megatron_oprd.weights.source import WeightSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """The facts about a checkpoint that this tool shows."""

    folder: str
    format: str  # "Hugging Face" or "Megatron (torch_dist)"
    architecture: Architecture | None  # None for unsupported families
    refusal: str | None  # the reason, if there is no architecture
    obstacles: Obstacles | None  # the differences from a supported family, if there is none
    padded_vocab_size: int | None  # rows of the embedding as stored
    layout: ParallelLayout  # of `shares`
    layout_padded_vocab_size: int | None  # rows that a run in this layout needs
    shares: list[Share]  # per pipeline rank; empty without architecture
    parts: list[Part]
    groups: list[TensorGroup]
    # (name, shape, dtype) of every tensor, if asked for.
    tensors: list[tuple[str, list[int], str]] | None
    manifest: dict[str, Any] | None  # without checksums; None if missing


def inspect(
    path: Path,
    layout: ParallelLayout,
    *,
    virtual_stages: int = 1,
    make_vocab_size_divisible_by: int = 128,
    every_tensor: bool = False,
    hf_config: Path | None = None,
) -> Inspection:
    """Reads a checkpoint's configurations and headers, and no weights.

    Raises `UserError` if it cannot be read or the layout does not divide it.
    """
    # Hugging Face folders of unknown families are shown as well, without architecture and shares.
    source: WeightSource = (
        open_weights(path, hf_config) if is_megatron(path) else HFCheckpoint(path)
    )
    architecture, refusal, stored_rows, obstacles = None, None, None, None
    try:
        opened = open_checkpoint(path, hf_config=hf_config if is_megatron(path) else None)
        opened.check_tensors()
        source = opened.source
        architecture = opened.architecture
        # The embedding is the table's first mapping.
        stored_rows = opened.table[0].local_shape(1)[0]
    except UserError as error:
        if is_megatron(path):
            raise
        refusal = str(error)
        obstacles = find_obstacles(source.config, source.names())
    of_layout, rows = [], None
    if architecture is not None:
        rows = padded_vocab_size(
            architecture,
            divisible_by=make_vocab_size_divisible_by,
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
        )
        of_layout = shares(
            architecture,
            source,
            layout,
            virtual_stages=virtual_stages,
            padded_vocab_size=rows,
        )
    return Inspection(
        folder=str(source.folder),
        format="Megatron (torch_dist)" if is_megatron(path) else "Hugging Face",
        architecture=architecture,
        refusal=refusal,
        obstacles=obstacles,
        padded_vocab_size=stored_rows,
        layout=layout,
        layout_padded_vocab_size=rows,
        shares=of_layout,
        parts=parts(source, tied=bool(source.config.get("tie_word_embeddings"))),
        groups=tensor_groups(source),
        tensors=_tensors(source) if every_tensor else None,
        manifest=_manifest(source.folder),
    )


def _tensors(source: WeightSource) -> list[tuple[str, list[int], str]]:
    return [
        (name, list(source.shape(name)), dtype_name(source.dtype(name))) for name in source.names()
    ]


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in the folder or next to it, without the entries per tensor."""
    for path in (folder / MANIFEST_FILE, folder.parent / MANIFEST_FILE):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON: {error}.") from error
        if not isinstance(manifest, dict):
            raise UserError(f"{path} must hold a JSON object.")
        return {
            key: value
            for key, value in manifest.items()
            if not key.startswith(("checksums", "hf_dtypes"))
        }
    return None


def _show(console: Console, found: Inspection) -> None:
    console.print(f"{found.folder}: {found.format}", highlight=False)
    if found.manifest is not None:
        short = {key: _short(value) for key, value in found.manifest.items()}
        console.print(_fields("Manifest", short))
    if found.architecture is not None:
        fields = {
            field.name: _short(getattr(found.architecture, field.name))
            for field in dataclasses.fields(found.architecture)
        }
        if found.format != "Hugging Face":
            fields["vocab_size"] += f", padded to {found.padded_vocab_size} in this checkpoint"
        console.print(_fields("Architecture", fields))
    else:
        console.print(f"not supported here: {found.refusal}", highlight=False)
    if found.obstacles is not None:
        console.print(_obstacles_table(found.obstacles))
    console.print(_parts_table(found.parts))
    if found.tensors is None:
        console.print(_groups_table(found.groups))
    else:
        console.print(_tensors_table(found.tensors))
    if found.shares:
        console.print(_shares_table(found))


def _fields(title: str, fields: dict[str, str]) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(name, value)
    return table


def _obstacles_table(of: Obstacles) -> Table:
    table = Table(
        title=f"In the way, compared with {of.family}",
        caption="the code may differ in more than these: docs/add-a-family.md",
    )
    table.add_column("what")
    table.add_column("which", overflow="fold")
    for name, value in of.fields.items():
        table.add_row("field", f"{name} = {_short(value)}")
    for name in of.unknown_tensors:
        table.add_row("unknown tensor", name)
    for name in of.missing_tensors:
        table.add_row("missing tensor", name)
    return table


def _parts_table(of: Sequence[Part]) -> Table:
    table = Table(title="Parameters")
    table.add_column("part")
    for title in ("tensors", "parameters", "active", "bytes"):
        table.add_column(title, justify="right")
    rows = [[one.num_tensors, one.parameters, one.active, one.num_bytes] for one in of]
    for one, row in zip(of, rows, strict=True):
        table.add_row(one.name, *map(_count, row))
    table.add_section()
    # A sum with an unknown addend is unknown.
    sums = (
        None if None in column else sum(value for value in column if value is not None)
        for column in zip(*rows, strict=True)
    )
    table.add_row("total", *map(_count, sums))
    if any(one.active is None for one in of):
        table.caption = "?: packed weights, or experts whose number the configuration does not say"
    return table


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _groups_table(groups: Sequence[TensorGroup]) -> Table:
    table = Table(title="Tensors")
    table.add_column("name", overflow="fold")
    for title in ("count", "shape", "dtype"):
        table.add_column(title, justify="right")
    for group in groups:
        shape = " x ".join(map(str, group.shape))
        table.add_row(group.pattern, str(group.count), shape, dtype_name(group.dtype))
    return table


def _tensors_table(tensors: Sequence[tuple[str, list[int], str]]) -> Table:
    table = Table(title="Tensors")
    table.add_column("name", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("dtype", justify="right")
    for name, shape, dtype in tensors:
        table.add_row(name, " x ".join(map(str, shape)), dtype)
    return table


def _shares_table(found: Inspection) -> Table:
    assert found.architecture is not None
    sizes = dataclasses.asdict(found.layout)
    if found.architecture.moe is not None:
        sizes["expert_tensor_parallel_size"] = found.layout.expert_tensor_size
    layout = ", ".join(f"{name} {size}" for name, size in sizes.items() if (size or 1) > 1)
    table = Table(
        title=f"Each rank's weights: {layout or 'one rank'}",
        caption=f"vocabulary padded to {found.layout_padded_vocab_size} rows; bytes in the "
        "checkpoint's dtypes",
    )
    table.add_column("pipeline rank", justify="right")
    table.add_column("layers", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("bytes", justify="right")
    for share in found.shares:
        table.add_row(
            str(share.pp_rank),
            f"{len(share.layers)}: {ranges(share.layers)}",
            f"{share.parameters:,}",
            f"{share.num_bytes:,}",
        )
    return table


def _short(value: Any) -> str:
    """A value in a line or two; of a dataclass, only the fields that are set."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return ", ".join(f"{name} {_short(one)}" for name, one in fields.items() if one is not None)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; `argv` defaults to the process's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_tools.inspect",
        description="Show what a checkpoint is and how a layout would divide it.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON")
    parser.add_argument(
        "--hf-config",
        type=Path,
        metavar="DIR",
        help="folder with config.json, for a Megatron checkpoint that carries none",
    )
    layout = parser.add_argument_group("the layout whose ranks are shown")
    add_layout_arguments(layout)
    layout.add_argument(
        "--virtual-pipeline-model-parallel-size", type=positive, default=1, metavar="N"
    )
    layout.add_argument("--make-vocab-size-divisible-by", type=positive, default=128, metavar="N")
    args = parser.parse_args(argv)
    check_report_file("--json", args.json)

    found = inspect(
        args.folder,
        layout_of(args),
        virtual_stages=args.virtual_pipeline_model_parallel_size,
        make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
        every_tensor=args.tensors,
        hf_config=args.hf_config,
    )
    if args.json is not None:
        content = json.dumps(dataclasses.asdict(found), indent=2, default=dtype_name)
        args.json.write_text(content + "\n", encoding="utf-8")
    _show(make_console(), found)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
