"""Loads this rank's shard of a checkpoint, reading only the slices it needs."""

import time
from collections.abc import Callable, Sequence
from math import prod
from typing import Protocol

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_oprd.errors import UserError, say, speaks
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights.accounting import check_tensors, check_tied_head
from megatron_oprd.weights.mapping import Mapping, Piece
from megatron_oprd.weights.megatron_keys import named_parameters
from megatron_oprd.weights.progress import Progress
from megatron_oprd.weights.source import WeightSource


class Store(Protocol):
    """Stores a parameter that is not kept as it is read: FP8 weights."""

    def __call__(
        self, mapping: Mapping, pieces: Sequence[Piece], fill: Callable[[Tensor], None]
    ) -> None:
        """Stores this rank's part of the parameter of ``mapping``.

        ``pieces`` make up the part. ``fill`` writes the values into a tensor of the part's shape,
        of any dtype.
        """


@torch.no_grad()
def load_weights(
    chunks: Sequence[MegatronModule],  # not wrapped; values are cast to their dtypes
    table: Sequence[Mapping],  # of the whole model
    checkpoint: WeightSource,
    *,
    place: ParallelLayout,
    tied: bool,  # embedding and LM head are one weight
    stores: dict[str, Store] | None = None,  # by name of the parameter
) -> None:
    """Fills this rank's parameters; does not read tensors of layers that were not built.

    Rank 0 says how much it has read, and how fast.

    Raises `UserError` if the checkpoint's tensors do not match the table, a tied head differs from
    the embedding, or values are NaN or infinite.
    """
    check_tensors(table, checkpoint, tied=tied)
    if tied:
        check_tied_head(checkpoint)
    mappings = {mapping.megatron: mapping for mapping in table}
    if tied:
        # The last stage's copy of a tied embedding.
        mappings["output_layer.weight"] = mappings["embedding.word_embeddings.weight"]
    parameters = named_parameters(chunks)
    for name in parameters:
        assert name in mappings, f"parameter {name} is in no mapping"
        assert mappings[name].is_held_at(place), f"parameter {name} belongs on another rank"
    started, num_read = time.perf_counter(), 0
    total = sum(_bytes_of(mappings[name], place, checkpoint) for name in parameters)
    with Progress(f"reading {checkpoint.folder}", total, shown=speaks()) as progress:
        for name, parameter in parameters.items():
            mapping = mappings[name]
            rank, size = mapping.split_at(place)
            expected = mapping.local_shape(size)
            assert parameter.shape == expected, f"{name}: {tuple(parameter.shape)} != {expected}"
            pieces = mapping.pieces(rank, size)

            # A default argument: a closure would see the pieces of a later parameter.
            def fill(target: Tensor, pieces: Sequence[Piece] = pieces) -> None:
                nonlocal num_read
                num_bytes = fill_parameter(target, pieces=pieces, checkpoint=checkpoint)
                num_read += num_bytes
                progress.advance(num_bytes)

            # One such parameter after the other, so that only one is in memory as it was read.
            if stores is not None and name in stores:
                stores[name](mapping, pieces, fill)
            else:
                fill(parameter.data)
    seconds = time.perf_counter() - started
    say(
        f"{checkpoint.folder}: rank 0 read {num_read / 1e9:.3g} GB in {seconds:.3g} s, "
        f"{num_read / 1e9 / seconds:.3g} GB/s"
    )


def _bytes_of(mapping: Mapping, place: ParallelLayout, checkpoint: WeightSource) -> int:
    """Bytes of a rank's part of a parameter, in the checkpoint's dtype, padding included."""
    _, size = mapping.split_at(place)
    return prod(mapping.local_shape(size)) * checkpoint.dtype(next(iter(mapping.hf))).itemsize


def fill_parameter(target: Tensor, *, pieces: Sequence[Piece], checkpoint: WeightSource) -> int:
    """Reads ``pieces`` into a rank's parameter and returns their bytes; padding becomes zero.

    Raises `UserError` if values are NaN or infinite.
    """
    num_bytes = 0
    for piece in pieces:
        part = target[piece.local_index]
        if piece.hf is None:
            part.zero_()
        else:
            values = checkpoint.read_slice(piece.hf, *piece.hf_index)
            # A cheap test first: a value that is not finite makes the sum so. The sum may also
            # overflow, hence the exact count.
            if not values.sum().isfinite() and (count := int((~values.isfinite()).sum())):
                raise UserError(
                    f"{checkpoint.folder}: {count} values of {piece.hf} are NaN or infinite; give "
                    "a checkpoint that is whole"
                )
            part.copy_(values)
            num_bytes += values.nbytes
    return num_bytes
