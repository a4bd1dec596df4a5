"""Casts to dtypes of a smaller range, where large finite values would become infinite."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.errors import UserError
from megatron_oprd.weights.positioned_reads import row_blocks, slices_of
from megatron_oprd.weights.source import WeightSource

ROWS_BYTES = 2**26  # bytes of a tensor examined at a time


def count_overflows(values: Tensor, dtype: torch.dtype) -> int:
    """Counts the finite values of a CPU tensor that become infinite in ``dtype``.

    Costs one pass for the minimum and maximum if none does.
    """
    if not values.numel() or not _narrows(values.dtype, dtype):
        return 0
    low, high = torch.aminmax(values)
    limit = torch.finfo(dtype).max
    if -limit <= float(low) and float(high) <= limit:
        return 0
    # Not conclusive: aminmax propagates NaN, the tensor may hold infinities, and values just above
    # the limit round down to it.
    return int(_overflows(values, dtype).sum())


def overflow_error(source: WeightSource, name: str, dtype: torch.dtype) -> UserError:
    """Builds the error for a tensor that overflows in ``dtype``; reads the whole tensor again.

    The message gives the number of values, the largest, and the dtypes that would fit.
    """
    count, largest = 0, 0.0
    whole = [(0, n) for n in source.shape(name)]
    for rows in row_blocks(whole, source.dtype(name).itemsize, ROWS_BYTES):
        values = source.read_slice(name, *slices_of(rows))
        too_large = values[_overflows(values, dtype)]
        if too_large.numel():
            count += too_large.numel()
            largest = max(largest, float(too_large.abs().max()))
    fitting = [one for one in (torch.bfloat16, torch.float32) if largest <= torch.finfo(one).max]
    right = f"give {' or '.join(map(dtype_name, fitting))}" if fitting else "leave it out"
    return UserError(
        f"--dtype {dtype_name(dtype)}: {source.folder} has {count} finite values in {name} that "
        f"would become infinite; the largest is {largest:.6g}, and {dtype_name(dtype)} ends at "
        f"{torch.finfo(dtype).max:.6g}. For these weights {right}."
    )


def _narrows(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` has a smaller range than ``stored``."""
    if not (stored.is_floating_point and dtype.is_floating_point):
        return False
    return torch.finfo(dtype).max < torch.finfo(stored).max


def _overflows(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).isinf() & values.isfinite()


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name in configurations and on command lines, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def config_with_dtype(
    config: Mapping[str, Any], dtype: torch.dtype | None
) -> dict[str, Any] | None:
    """The config.json content for weights cast to ``dtype``; None if the content need not change.

    A ``dtype`` of None means that the weights were not cast.
    """
    if dtype is None:
        return None
    name = dtype_name(dtype)
    # transformers 4 writes torch_dtype, 5 writes dtype; a config may have both.
    fields = [field for field in ("dtype", "torch_dtype") if field in config] or ["dtype"]
    cast = dict.fromkeys(fields, name)
    changed = {**config, **cast}
    return None if changed == config else changed
