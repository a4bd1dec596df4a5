"""Reads MXFP4 weights as the values that they stand for, a slice at a time.

GPT-OSS's published form: ``NAME_blocks`` [e, rows, groups, 16] has two codes of 4 bits a byte, the
lower half first, and ``NAME_scales`` [e, rows, groups] an exponent for each group of 32 codes. The
tensor NAME is [e, 32 groups, rows]: transformers transposes each expert's matrix.
"""

import torch
from torch import Tensor
from typing_extensions import override

from megatron_oprd.errors import UserError
from megatron_oprd.weights.dequantised import Dequantised
from megatron_oprd.weights.positioned_reads import slice_bounds, slices_of

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES_OF_GROUP = 16
_BIAS = 127  # of exponents
# The magnitudes of E2M1's codes; the highest bit is the sign.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class DequantisedMXFP4(Dequantised):
    """A Hugging Face folder with MXFP4 weights, read as one without; a `WeightSource`.

    Values have the configuration's dtype (bf16 if it names none). What is in memory beside the
    result is the slice's codes, of whole experts.

    Raises:
        UserError: Codes and scales do not fit each other.
    """

    DEFAULT_DTYPE = "bfloat16"

    @override
    def names(self) -> list[str]:
        """The tensors' names, without codes and scales."""
        return [
            name.removesuffix(_BLOCKS)
            for name in self._checkpoint.names()
            if not name.endswith(_SCALES)
        ]

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        if not self._is_code(name):
            return self._checkpoint.shape(name)
        experts, rows, groups, size = self._checkpoint.shape(name + _BLOCKS)
        return experts, groups * size * 2, rows

    @override
    def read_slice(self, name: str, *slices: slice, out: Tensor | None = None) -> Tensor:
        """Reads a part of a tensor; the arguments are those of `WeightSource.read_slice`."""
        if not self._is_code(name):
            return self._checkpoint.read_slice(name, *slices, out=out)
        experts, columns, rows = slices_of(slice_bounds(name, self.shape(name), slices))
        # Rows and columns change places.
        blocks = self._checkpoint.read_slice(name + _BLOCKS, experts, rows)
        scales = self._checkpoint.read_slice(name + _SCALES, experts, rows)
        values = decode(blocks, scales, self._dtype).mT[:, columns]
        return values.contiguous() if out is None else out.copy_(values)

    @override
    def _is_code(self, name: str) -> bool:
        return self._checkpoint.has(name + _BLOCKS)

    @override
    def _check_scales(self) -> None:
        stored = set(self._checkpoint.names())
        for name in stored:
            for suffix, other in ((_BLOCKS, _SCALES), (_SCALES, _BLOCKS)):
                if name.endswith(suffix) and name.removesuffix(suffix) + other not in stored:
                    raise UserError(
                        f"{self.folder}: {name} has no {name.removesuffix(suffix)}{other} beside it"
                    )
            if not name.endswith(_BLOCKS):
                continue
            scales = name.removesuffix(_BLOCKS) + _SCALES
            shape, of_scales = self._checkpoint.shape(name), self._checkpoint.shape(scales)
            if len(shape) != 4 or shape[-1] != _BYTES_OF_GROUP or shape[:-1] != of_scales:
                raise UserError(
                    f"{self.folder}: {name} has shape {list(shape)} and {scales} "
                    f"{list(of_scales)}; they have to be [experts, rows, groups, "
                    f"{_BYTES_OF_GROUP}] and the same without the last"
                )
            for one in (name, scales):
                if self._checkpoint.dtype(one) != torch.uint8:
                    raise UserError(
                        f"{self.folder}: {one} is {self._checkpoint.dtype(one)}; codes and scales "
                        "of MXFP4 are uint8"
                    )


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values [..., 32 groups] of codes [..., groups, 16] and exponents [..., groups]."""
    table = torch.tensor([*_MAGNITUDES, *(-one for one in _MAGNITUDES)], dtype=dtype)
    codes = torch.stack([blocks & 0x0F, blocks >> 4], dim=-1).flatten(-2)
    exponents = scales.to(torch.int32)[..., None] - _BIAS
    return torch.ldexp(table[codes.int()], exponents).flatten(-2).to(dtype)
