"""Encodes weights as FP8 numbers (torch.float8_e4m3fn) with scales, and decodes them.

A plain format stores w / scale. E4M3 has 3 bits of mantissa, so a weight of any size is off by 2.6%
(root mean square). Its numbers are evenly spaced on a logarithmic axis over 18 factors of 2, of
which the weights of a row need 4 or 5. A logarithmic format stores

    v = sign(w) * eps * (exp(|w| / scale) - 1),    w = sign(v) * scale * log(1 + |v| / eps)

so that numbers above eps are evenly spaced on the weight's own axis: 0.8% off, for the same byte.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(DTYPE).max  # 448
# Half of this is 5% more exact on most rows of SmolLM2's matrices, but has 1.5 times the error in
# the row with the largest outlier (28 standard deviations).
_EPS = 2.0**-3
# Elements encoded or decoded at a time, in fp32: bounds the memory next to the result.
ELEMENTS_AT_A_TIME = 2**22


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """The storage format of a weight [out, in], with one scale per block."""

    block_rows: int
    block_columns: int | None  # None: all columns
    logarithmic: bool  # the logarithm in the module's docstring

    @property
    def largest(self) -> float:
        """The largest weight representable at scale 1."""
        return float(_decoded(torch.tensor(_LARGEST), self.logarithmic))


FORMATS = {
    "per_channel_log": WeightFormat(block_rows=1, block_columns=None, logarithmic=True),
    "per_channel": WeightFormat(block_rows=1, block_columns=None, logarithmic=False),
    "block_128": WeightFormat(block_rows=128, block_columns=128, logarithmic=False),
}


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The scales of a weight [out, in], or of a rank's part of it."""

    values: Tensor  # [row blocks, column blocks], fp32
    # [out] and [in], int32: the row and column of `values` of each row and column of the weight.
    # None: each row has its own; there is one column.
    row_block: Tensor | None
    column_block: Tensor | None

    def of_rows(self, start: int, stop: int) -> Tensor:
        """The scale of each weight in rows [start, stop), as [stop - start, in or 1]."""
        if self.row_block is None:
            scales = self.values[start:stop]
        else:
            scales = self.values.index_select(0, self.row_block[start:stop])
        return scales if self.column_block is None else scales.index_select(1, self.column_block)


def encode(weight: Tensor, scales: Scales, weight_format: WeightFormat, out: Tensor) -> None:
    """Encodes ``weight`` [out, in] of any dtype into ``out``, FP8 of the same shape."""
    for start, stop in _runs_of_rows(weight):
        # A block of zeros has scale 0.
        scale = scales.of_rows(start, stop)
        scaled = weight[start:stop].float() / torch.where(scale > 0, scale, 1.0)
        if weight_format.logarithmic:
            # expm1 and log1p stay exact near 0.
            scaled = torch.copysign(torch.expm1(scaled.abs()).mul_(_EPS), scaled)
        out[start:stop] = scaled.clamp_(-_LARGEST, _LARGEST).to(DTYPE)


def decode(
    stored: Tensor, scales: Scales, weight_format: WeightFormat, dtype: torch.dtype
) -> Tensor:
    """Decodes ``stored`` [out, in] into a new tensor; computes in fp32."""
    weight = torch.empty(stored.shape, dtype=dtype, device=stored.device)
    for start, stop in _runs_of_rows(stored):
        values = _decoded(stored[start:stop].float(), weight_format.logarithmic)
        weight[start:stop] = values.mul_(scales.of_rows(start, stop))
    return weight


def _decoded(stored: Tensor, logarithmic: bool) -> Tensor:
    """Stored numbers in fp32 --> weights at scale 1."""
    if not logarithmic:
        return stored
    return torch.copysign(stored.abs().div_(_EPS).log1p_(), stored)


def _runs_of_rows(weight: Tensor) -> list[tuple[int, int]]:
    rows, columns = weight.shape
    step = max(1, ELEMENTS_AT_A_TIME // columns)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
