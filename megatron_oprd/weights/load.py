"""Safetensors -> this rank's shard, reading only the slices it needs."""

from collections.abc import Iterable, Sequence

import torch
from megatron.core.transformer.module import MegatronModule

from megatron_oprd.errors import UserError
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.mapping import Mapping
from megatron_oprd.weights.parameters import named_parameters

# Stored by old versions of transformers; computed from the configuration here as there.
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)


def check_tensors(table: Iterable[Mapping], checkpoint: HFCheckpoint, *, tied: bool) -> None:
    """Checks that the folder holds exactly the tensors of the table, in their shapes.

    Only the files' headers are read. A tied model may store its head a second time.

    Raises:
        UserError: Tensors are missing, left over, or of another shape.
    """
    expected = {name: shape for mapping in table for name, shape in mapping.hf.items()}
    found = {name for name in checkpoint.names() if not name.endswith(_DERIVED_SUFFIXES)}
    if tied:
        found.discard("lm_head.weight")
    missing, left_over = sorted(expected.keys() - found), sorted(found - expected.keys())
    if missing or left_over:
        raise UserError(
            f"{checkpoint.folder}: its tensors are not those of its configuration; "
            f"missing: {_some(missing)}; left over: {_some(left_over)}"
        )
    for name, shape in expected.items():
        if checkpoint.shape(name) != shape:
            raise UserError(
                f"{checkpoint.folder}: {name} has shape {list(checkpoint.shape(name))}; its "
                f"configuration says {list(shape)}"
            )


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if names[5:] else ''}" or "none"


@torch.no_grad()
def load_weights(
    chunks: Sequence[MegatronModule],
    table: Sequence[Mapping],
    checkpoint: HFCheckpoint,
    *,
    tp_rank: int,
    tp_size: int,
    tied: bool,
) -> None:
    """Fills this rank's parameters; tensors of layers that were not built are not read.

    Args:
        chunks: This rank's model chunks, not wrapped; values are cast to their dtypes.
        table: The whole model's mappings.
        checkpoint: The folder to read.
        tp_rank: This rank in its tensor-parallel group.
        tp_size: Size of the tensor-parallel group.
        tied: Whether embedding and LM head are one weight.

    Raises:
        UserError: The folder's tensors are not those of the table, or a tied model's folder has a
            head that differs from the embedding.
    """
    check_tensors(table, checkpoint, tied=tied)
    if tied and "lm_head.weight" in checkpoint.names():
        embedding, head = (
            checkpoint.read(name) for name in ("model.embed_tokens.weight", "lm_head.weight")
        )
        if not torch.equal(embedding, head):
            raise UserError(
                f"{checkpoint.folder}: tie_word_embeddings is true, but lm_head.weight differs "
                "from model.embed_tokens.weight"
            )
    mappings = {mapping.megatron: mapping for mapping in table}
    for name, parameter in named_parameters(chunks).items():
        assert name in mappings, f"parameter {name} is in no mapping"
        mapping = mappings[name]
        expected = mapping.local_shape(tp_size)
        assert parameter.shape == expected, f"{name}: {tuple(parameter.shape)} != {expected}"
        for piece in mapping.pieces(tp_rank, tp_size):
            target = parameter.data[piece.local_index]
            if piece.hf is None:
                target.zero_()
            else:
                target.copy_(checkpoint.read_slice(piece.hf, *piece.hf_index))
