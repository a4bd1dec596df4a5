"""Compares two checkpoints: tensors, configuration and files, and the values bit by bit."""

import copy
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_oprd.weights.accounting import is_derived
from megatron_oprd.weights.casting import dtype_name
from megatron_oprd.weights.hf_files import companion_name
from megatron_oprd.weights.positioned_reads import row_blocks, slices_of
from megatron_oprd.weights.source import WeightSource

ROWS_BYTES = 2**26  # bytes of a tensor compared at a time
# These name the config's writer and its folder, not the model.
_NEUTRAL_FIELDS = {"transformers_version", "_name_or_path"}
# transformers 4 and 5 write the same setting under different names.
_DTYPE_FIELDS = {"dtype", "torch_dtype"}
_ROPE_FIELDS = {"rope_parameters", "rope_scaling", "rope_theta"}

_logger = logging.getLogger(__name__)

Kind = Literal["tensor", "shape", "dtype", "config", "file"]


@dataclass(frozen=True, kw_only=True)
class KeyDifference:
    """Something that only one checkpoint has, or that differs between the two."""

    kind: Kind  # "config": a field of config.json; "file": a companion file
    name: str
    a: str | None  # the first checkpoint's, as text; None if absent
    b: str | None


@dataclass(frozen=True, kw_only=True)
class ValueDifference:
    """A tensor whose values differ."""

    name: str
    num_different: int  # values with different bits
    num_values: int
    index: tuple[int, ...]  # position of the first of them
    a: float  # value at ``index`` in the first checkpoint
    b: float  # value at ``index`` in the second
    largest: float  # largest absolute difference; infinite where only one value is NaN


def compare_keys(
    a: WeightSource, b: WeightSource, *, ignore_dtypes: bool = False
) -> list[KeyDifference]:
    """Compares names, shapes and dtypes of tensors, config fields and companion files.

    Reads no weights and skips derived tensors (stored rotary frequencies). Rotary settings and
    dtype may be spelled in the way of transformers 4 or 5. ``ignore_dtypes`` covers tensors and
    config.json.
    """
    found: list[KeyDifference] = []

    def add(kind: Kind, name: str, of_a: Any, of_b: Any) -> None:
        if of_a != of_b:
            found.append(KeyDifference(kind=kind, name=name, a=of_a, b=of_b))

    names_a, names_b = (dict.fromkeys(weight_names(source)) for source in (a, b))
    for name in names_a | names_b:
        if name in names_a and name in names_b:
            add("shape", name, str(list(a.shape(name))), str(list(b.shape(name))))
            if not ignore_dtypes:
                add("dtype", name, dtype_name(a.dtype(name)), dtype_name(b.dtype(name)))
        else:
            add(
                "tensor",
                name,
                *("there" if name in names else None for names in (names_a, names_b)),
            )
    skipped = _NEUTRAL_FIELDS | (_DTYPE_FIELDS if ignore_dtypes else set())
    skipped |= _spelled_otherwise(a.config, b.config)
    for field in a.config | b.config:
        if field not in skipped:
            add("config", field, _field(a.config, field), _field(b.config, field))
    files_a, files_b = (
        {companion_name(path): path for path in source.companion_files()} for source in (a, b)
    )
    for name in files_a | files_b:
        content_a, content_b = (
            files[name].read_bytes() if name in files else None for files in (files_a, files_b)
        )
        if content_a != content_b:
            sizes = (None if one is None else f"{len(one)} bytes" for one in (content_a, content_b))
            if content_a is not None and content_b is not None:
                sizes = (f"{size}, other content" for size in sizes)
            found.append(
                KeyDifference(kind="file", name=name, **dict(zip("ab", sizes, strict=True)))
            )
    return found


def compare_values(
    a: WeightSource,
    b: WeightSource,
    *,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> list[ValueDifference]:
    """Compares the bits of every tensor that both have in the same shape, in blocks of rows.

    Casts both to ``dtype`` first if given; else compares as stored, and in float64 where dtypes
    differ. ``advance`` is called with the bytes of ``a`` compared since its last call.
    """
    in_b = set(weight_names(b))
    differences = []
    for name in weight_names(a):
        if name in in_b and a.shape(name) == b.shape(name):
            difference = _compare_tensor(a, b, name, dtype, advance)
            if difference is not None:
                differences.append(difference)
    return differences


def weight_names(source: WeightSource) -> list[str]:
    """The names of a checkpoint's tensors without the derived ones."""
    return [name for name in source.names() if not is_derived(name)]


def _compare_tensor(
    a: WeightSource,
    b: WeightSource,
    name: str,
    dtype: torch.dtype | None,
    advance: Callable[[int], object],
) -> ValueDifference | None:
    # float64 holds every value of the other floating dtypes exactly.
    if dtype is None and a.dtype(name) != b.dtype(name):
        dtype = torch.float64
    shape = a.shape(name)
    num_different, largest = 0, 0.0
    first: tuple[tuple[int, ...], float, float] | None = None
    for block in row_blocks([(0, n) for n in shape], a.dtype(name).itemsize, ROWS_BYTES):
        part_a, part_b = (one.read_slice(name, *slices_of(block)) for one in (a, b))
        advance(part_a.nbytes)
        if dtype is not None:
            part_a, part_b = part_a.to(dtype), part_b.to(dtype)
        # The usual case, in one pass and without a mask.
        if _same_bits(part_a, part_b):
            continue
        # Bits, not values: -0.0 differs from 0.0, and a NaN equals its own copy.
        different = _bits(part_a) != _bits(part_b)
        num_different += int(different.sum())
        if first is None:
            index = tuple(different.nonzero()[0].tolist())
            whole = tuple(i + start for i, (start, _) in zip(index, block, strict=True))
            first = whole, float(part_a[index]), float(part_b[index])
        here = absolute_difference(part_a[different], part_b[different]).max()
        largest = max(largest, float(here))
    if first is None:
        return None
    return ValueDifference(
        name=name,
        num_different=num_different,
        num_values=math.prod(shape),
        index=first[0],
        a=first[1],
        b=first[2],
        largest=largest,
    )


def absolute_difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| in float64: 0 for equal infinities or two NaNs, infinite if only one is NaN."""
    a, b = a.double(), b.double()
    difference = (a - b).abs()
    # The order matters: inf - inf is NaN too, and the next line resets it to 0.
    difference[difference.isnan()] = torch.inf
    difference[(a == b) | (a.isnan() & b.isnan())] = 0.0
    return difference


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _bits(tensor: Tensor) -> Tensor:
    """Reinterprets a floating-point tensor as integers of the same width."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    )


def _spelled_otherwise(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    """The fields that are spelled differently in two configs but mean the same."""
    found: set[str] = set()
    # A config may have both fields, and they may contradict each other.
    dtypes = [{config[field] for field in _DTYPE_FIELDS if config.get(field)} for config in (a, b)]
    if dtypes[0] == dtypes[1] and len(dtypes[0]) <= 1:
        found |= _DTYPE_FIELDS
    # A config without any rotary field may have lost it, even if the defaults happen to agree.
    says_something = all(not _ROPE_FIELDS.isdisjoint(config) for config in (a, b))
    if says_something and any(_field(a, field) != _field(b, field) for field in _ROPE_FIELDS):
        rope_a, rope_b = _read_rope(a), _read_rope(b)
        if rope_a is not None and rope_a == rope_b:
            found |= _ROPE_FIELDS
    return found


def _read_rope(config: dict[str, Any]) -> dict[str, Any] | None:
    """The rotary settings as transformers 5 has them; None if it rejects the config."""
    try:
        # Deep, because from_dict modifies nested dictionaries.
        read = CONFIG_MAPPING[config.get("model_type")].from_dict(copy.deepcopy(config))
    except Exception as error:  # transformers' checks raise exceptions of many types
        _logger.debug("transformers does not read this config: %s", error)
        return None
    # `type` is the old name of rope_type, and transformers copies it there.
    rope = getattr(read, "rope_parameters", None)
    return None if rope is None else {name: rope[name] for name in rope if name != "type"}


def _field(config: dict[str, Any], field: str) -> str | None:
    return json.dumps(config[field], sort_keys=True) if field in config else None
