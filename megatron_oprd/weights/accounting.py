"""Checks that a checkpoint holds exactly the tensors its configuration calls for."""

from collections.abc import Iterable, Sequence

import torch

from megatron_oprd.errors import UserError
from megatron_oprd.weights.casting import dtype_name
from megatron_oprd.weights.mapping import Mapping
from megatron_oprd.weights.source import WeightSource

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Stored by old versions of transformers; newer ones, and Megatron, compute them.
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Rows of embedding and head compared at a time, so that neither is in memory as a whole.
ROWS = 4096


def check_tensors(table: Iterable[Mapping], source: WeightSource, *, tied: bool) -> None:
    """Checks that a checkpoint has exactly the table's tensors, in their shapes; reads no weights.

    A tied model may store its head as well. Raises `UserError` for tensors that are missing,
    unexpected, of another shape, or quantised.
    """
    expected = {name: shape for mapping in table for name, shape in mapping.hf.items()}
    found = {name for name in source.names() if not is_derived(name)}
    # save_pretrained drops a tied head, other writers keep it. Its values are checked in
    # check_tied_head.
    if tied:
        found.discard(HEAD)
    refuse_differences(str(source.folder), expected=expected.keys(), found=found)
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise UserError(
                f"{source.folder}: {name} has shape {list(source.shape(name))}, but its "
                f"configuration says {list(shape)}"
            )
        if source.dtype(name) not in _WEIGHT_DTYPES:
            raise UserError(
                f"{source.folder}: {name} is {dtype_name(source.dtype(name))}; weights have to be "
                "float32, bfloat16, float16 or float64. Dequantise quantised weights first, with "
                "their scales"
            )


def refuse_differences(folder: str, *, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raises `UserError` if tensor names are missing or unexpected."""
    wanted, there = set(expected), set(found)
    missing, left_over = sorted(wanted - there), sorted(there - wanted)
    if missing or left_over:
        raise UserError(
            f"{folder} does not have the tensors of its configuration; missing: {_some(missing)}; "
            f"left over: {_some(left_over)}"
        )


def check_tied_head(source: WeightSource) -> None:
    """Raises `UserError` if a tied model stores a head that differs from the embedding."""
    if HEAD not in source.names():
        return
    same = source.shape(HEAD) == source.shape(EMBEDDING)
    for start in range(0, source.shape(EMBEDDING)[0], ROWS):
        if not same:
            break
        rows = slice(start, start + ROWS)
        # Compared as bytes, because as floats a NaN would differ from its own copy.
        embedding, head = (
            source.read_slice(name, rows).view(torch.uint8) for name in (EMBEDDING, HEAD)
        )
        same = torch.equal(embedding, head)
    if not same:
        raise UserError(
            f"{source.folder} has tie_word_embeddings = true, but its {HEAD} differs from "
            f"{EMBEDDING}; make them equal, or set tie_word_embeddings = false"
        )


def is_derived(name: str) -> bool:
    """Whether a tensor is computed from the configuration, so that it is not a weight."""
    return name.endswith(_DERIVED_SUFFIXES)


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if names[5:] else ''}" or "none"
