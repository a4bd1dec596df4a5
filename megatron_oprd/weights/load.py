"""Loads this rank's shard of a checkpoint, reading only the slices it needs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_oprd.errors import UserError
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights.accounting import check_tensors, check_tied_head
from megatron_oprd.weights.mapping import Mapping, Piece
from megatron_oprd.weights.megatron_keys import named_parameters
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
    for name, parameter in named_parameters(chunks).items():
        assert name in mappings, f"parameter {name} is in no mapping"
        mapping = mappings[name]
        assert mapping.is_held_at(place), f"parameter {name} belongs on another rank"
        rank, size = mapping.split_at(place)
        expected = mapping.local_shape(size)
        assert parameter.shape == expected, f"{name}: {tuple(parameter.shape)} != {expected}"
        pieces = mapping.pieces(rank, size)
        fill = partial(fill_parameter, pieces=pieces, checkpoint=checkpoint)
        # One such parameter after the other, so that only one is in memory as it was read.
        if stores is not None and name in stores:
            stores[name](mapping, pieces, fill)
        else:
            fill(parameter.data)


def fill_parameter(target: Tensor, *, pieces: Sequence[Piece], checkpoint: WeightSource) -> None:
    """Reads ``pieces`` into a rank's parameter; padding becomes zero.

    Raises `UserError` if values are NaN or infinite.
    """
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
