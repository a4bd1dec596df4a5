"""Casts to dtypes with a smaller range, in which a large value must not become infinite."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.errors import UserError
from megatron_oprd.weights.positioned_reads import row_blocks, slices_of
from megatron_oprd.weights.source import WeightSource

_ROWS_BYTES = 2**26  # of a tensor that are looked at at a time


def count_overflows(values: Tensor, dtype: torch.dtype) -> int:
    """How many finite values become infinite in ``dtype``, fast where none does.

    Args:
        values: CPU tensor of any shape and dtype.
        dtype: What it is to be cast to.
    """
    if not values.numel() or not _narrows(values.dtype, dtype):
        return 0
    low, high = torch.aminmax(values)
    limit = torch.finfo(dtype).max
    if -limit <= float(low) and float(high) <= limit:
        return 0
    # NaN, infinite already, too large, or so little too large that it is rounded to the limit.
    return int(_overflows(values, dtype).sum())


def overflow_error(source: WeightSource, name: str, dtype: torch.dtype) -> UserError:
    """The error for a tensor with values that become infinite; reads all of the tensor.

    Args:
        source: The checkpoint.
        name: The tensor.
        dtype: What it was to be cast to.
    """
    count, largest = 0, 0.0
    whole = [(0, n) for n in source.shape(name)]
    for rows in row_blocks(whole, source.dtype(name).itemsize, _ROWS_BYTES):
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
    """Whether values of ``stored`` can be out of the range of ``dtype``."""
    if not (stored.is_floating_point and dtype.is_floating_point):
        return False
    return torch.finfo(dtype).max < torch.finfo(stored).max


def _overflows(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).isinf() & values.isfinite()


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as configurations and command lines write it, as in ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def config_with_dtype(
    config: Mapping[str, Any], dtype: torch.dtype | None
) -> dict[str, Any] | None:
    """The content of config.json for weights that were cast; None where it stays as it is.

    Args:
        config: The content.
        dtype: What the weights were cast to; None if they were not.
    """
    if dtype is None:
        return None
    name = dtype_name(dtype)
    # transformers 4 writes one name, 5 the other; a config may have both.
    fields = [field for field in ("dtype", "torch_dtype") if field in config] or ["dtype"]
    cast = dict.fromkeys(fields, name)
    changed = {**config, **cast}
    return None if changed == config else changed
