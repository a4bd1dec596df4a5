"""Reads FP8 weights as the values that they stand for, a slice at a time."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.errors import UserError
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.positioned_reads import bounds_of, shape_of, slice_bounds, slices_of
from megatron_oprd.weights.quantization import Quantization, without_quantization

_FP8 = torch.float8_e4m3fn
_READ_AS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of engines that quantise activations with scales from a calibration.
_OF_ACTIVATIONS = (".input_scale", ".activation_scale")


class Dequantised:
    """A Hugging Face folder with FP8 weights and scales, read as one without; a `WeightSource`.

    A weight is its code times its scale, computed in fp32 and rounded to the configuration's dtype
    (fp32 if it names none), as transformers does. What is in memory beside the result is the
    slice's codes and its values in fp32.

    Raises:
        UserError: Scales have another shape than the weight and the configuration call for, or
            belong to no weight.
    """

    # Of values, where the configuration names no dtype.
    DEFAULT_DTYPE = "float32"

    def __init__(self, checkpoint: HFCheckpoint, quantization: Quantization) -> None:
        self._checkpoint, self._quantization = checkpoint, quantization
        config = without_quantization(checkpoint.config)
        checkpoint.replace_config(config)
        named = str(config.get("dtype") or config.get("torch_dtype") or self.DEFAULT_DTYPE)
        if named not in _READ_AS:
            raise UserError(
                f"{self.folder}: config.json has dtype = {named!r}; quantised weights are read as "
                f"{', '.join(_READ_AS)}"
            )
        self._dtype = _READ_AS[named]
        self._check_scales()

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._checkpoint.folder

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json, without the quantisation."""
        return self._checkpoint.config

    @property
    def hf_folder(self) -> Path:
        """A folder with this config.json and the companion files; gone with this object."""
        return self._checkpoint.hf_folder

    def leave_out(self, prefixes: tuple[str, ...]) -> None:
        """Hides the tensors whose names begin with one of ``prefixes``."""
        self._checkpoint.leave_out(prefixes)

    def names(self) -> list[str]:
        """The tensors' names, without the scales."""
        suffix = self._quantization.scale_suffix
        return [
            name
            for name in self._checkpoint.names()
            if not name.endswith((suffix, *_OF_ACTIVATIONS))
        ]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is read in."""
        return self._dtype if self._is_code(name) else self._checkpoint.dtype(name)

    def num_bytes(self) -> int:
        """The bytes of all tensors together, as they are read."""
        return sum(math.prod(self.shape(one)) * self.dtype(one).itemsize for one in self.names())

    def read(self, name: str) -> Tensor:
        """Reads a whole tensor."""
        return self.read_slice(name)

    def read_slice(self, name: str, *slices: slice, out: Tensor | None = None) -> Tensor:
        """Reads a part of a tensor; the arguments are those of `WeightSource.read_slice`."""
        if not self._is_code(name):
            return self._checkpoint.read_slice(name, *slices, out=out)
        bounds = slice_bounds(name, self.shape(name), slices)
        values = self._checkpoint.read_slice(name, *slices_of(bounds)).float()
        scales = self._checkpoint.read(self._scale_of(name)).float().reshape(self._grid(name))
        blocks = [
            torch.arange(start, stop) // size
            for (start, stop), size in zip(bounds, self._block(name), strict=True)
        ]
        # The scales of the slice's columns are spread over its rows a row of blocks at a time:
        # spread over both at once they would be as large as the slice.
        of_columns = scales[:, blocks[1]]
        for row in blocks[0].unique().tolist():
            values[blocks[0] == row] *= of_columns[row]
        if out is None:
            return values.to(self._dtype)
        assert out.shape == shape_of(bounds_of(slices_of(bounds)))
        return out.copy_(values)

    def companion_files(self) -> list[Path]:
        """The files that an exported model carries along."""
        return self._checkpoint.companion_files()

    def files(self) -> list[Path]:
        """The files that config and tensors are read from."""
        return self._checkpoint.files()

    def _scale_of(self, name: str) -> str:
        return name + self._quantization.scale_suffix

    def _is_code(self, name: str) -> bool:
        return self._checkpoint.dtype(name) == _FP8 and self._checkpoint.has(self._scale_of(name))

    def _block(self, name: str) -> tuple[int, int]:
        """Rows and columns with one scale."""
        rows, columns = self.shape(name)
        if self._quantization.block is not None:
            return self._quantization.block
        one = math.prod(self._checkpoint.shape(self._scale_of(name))) == 1
        return (rows if one else 1), columns

    def _grid(self, name: str) -> tuple[int, int]:
        """The number of scales over rows and over columns."""
        (rows, columns), (height, width) = self.shape(name), self._block(name)
        return -(-rows // height), -(-columns // width)

    def _check_scales(self) -> None:
        for scales in self._checkpoint.names():
            if not scales.endswith(self._quantization.scale_suffix):
                continue
            name = scales.removesuffix(self._quantization.scale_suffix)
            if not self._checkpoint.has(name) or self._checkpoint.dtype(name) != _FP8:
                raise UserError(f"{self.folder}: {scales} are the scales of no tensor in FP8")
            found, shape = self._checkpoint.shape(scales), self.shape(name)
            if len(shape) != 2:
                raise UserError(
                    f"{self.folder}: {name} has shape {list(shape)}; FP8 is read of matrices only, "
                    "so give a folder with one tensor for each expert"
                )
            if math.prod(found) != math.prod(self._grid(name)):
                raise UserError(
                    f"{self.folder}: {scales} has shape {list(found)}, but {name} of shape "
                    f"{list(shape)} needs {list(self._grid(name))} scales"
                )
