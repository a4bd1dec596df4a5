"""Linear layers of a frozen model with FP8 weights, without Transformer Engine.

These are Megatron's local linear layers with weights in the format of
`megatron_oprd.models.fp8_codes`, decoded in every forward pass. They run on any device, and
activations are not rounded, so the numbers do not depend on how a layer is split. The scales are
those of whole Hugging Face tensors, whatever part of them a rank holds.

torch._scaled_mm would multiply FP8 numbers directly but rounds activations, too. With scales by
token and channel, the lowest cosine of SmolLM2's layers is 0.993, against 0.996 with rounded
weights alone. On a CPU it is slower than decoding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_oprd.models import fp8_codes
from megatron_oprd.models.fp8_codes import Scales, WeightFormat
from megatron_oprd.weights.load import Store
from megatron_oprd.weights.mapping import Mapping, Piece
from megatron_oprd.weights.megatron_keys import named_parameters


class Blocks:
    """Maps each weight in a rank's part of a matrix to its quantization block and scale.

    Each Hugging Face tensor is divided into blocks from its own first row and column, so the blocks
    do not depend on how ranks share the weight. Rows of blocks are numbered through all tensors.
    """

    def __init__(
        self, mapping: Mapping, pieces: Sequence[Piece], weight_format: WeightFormat
    ) -> None:
        self._format = weight_format
        (columns,) = {columns for _, columns in mapping.hf.values()}
        # A block without a number of columns spans all of them.
        height, width = weight_format.block_rows, weight_format.block_columns or columns
        first_row: dict[str | None, int] = {}
        num_rows = 0
        for name, (rows, _) in mapping.hf.items():
            first_row[name] = num_rows
            num_rows += -(-rows // height)
        self._shape = num_rows, -(-columns // width)
        self._row_of = torch.cat(
            [
                first_row[piece.hf] + torch.arange(*_bounds(piece.hf_index[0])) // height
                for piece in pieces
            ]
        )
        ((start, stop),) = {_bounds(piece.hf_index[1]) for piece in pieces}
        self._column_of = torch.arange(start, stop) // width
        # Columns of blocks that this rank touches.
        self._columns = slice(int(self._column_of[0]), int(self._column_of[-1]) + 1)
        # The rank's columns, cut where one column of blocks ends and the next begins.
        ends = [min(max(end - start, 0), stop - start) for end in range(0, columns + width, width)]
        self._runs = [slice(*run) for run in pairwise(sorted(set(ends)))]

    def largest_magnitudes(self, weight: Tensor) -> Tensor:
        """The largest magnitude in each block of the whole weight, of this rank's [out, in] part.

        The result is [block rows, block columns], fp32; 0 for blocks outside this part.
        """
        of_rows = torch.stack(
            [
                torch.linalg.vector_norm(weight[:, run], ord=torch.inf, dim=1, dtype=torch.float32)
                for run in self._runs
            ],
            dim=1,
        )
        largest = torch.zeros(self._shape, device=weight.device)
        row_of = self._row_of.to(weight.device)[:, None].expand_as(of_rows)
        here = torch.zeros_like(largest[:, self._columns])
        largest[:, self._columns] = here.scatter_reduce_(0, row_of, of_rows, "amax")
        return largest

    def scales_of_part(self, whole: Tensor) -> Scales:
        """The scales of the rank's part, from ``whole`` in the order of `largest_magnitudes`."""
        device = whole.device
        # One scale per row: gather now, so that no row index is kept on the device.
        if self._format.block_rows == 1:
            values, row_block = whole[self._row_of.to(device), self._columns], None
        else:
            used, row_block = torch.unique(self._row_of, return_inverse=True)
            values = whole[used.to(device), self._columns]
            row_block = row_block.to(device, torch.int32)
        column_block = None
        if self._format.block_columns is not None:
            column_block = (self._column_of - self._columns.start).to(device, torch.int32)
        return Scales(values=values.contiguous(), row_block=row_block, column_block=column_block)


def _bounds(index: slice) -> tuple[int, int]:
    return index.start, index.stop


class _FP8Linear(torch.nn.Module):
    """Common base of both linear layers; comes before Megatron's class in the bases."""

    weight: torch.nn.Parameter
    weight_scale: Tensor | None
    row_block: Tensor | None
    column_block: Tensor | None
    tp_group: dist.ProcessGroup

    def __init__(self, *args: Any, weight_format: WeightFormat, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_format = weight_format
        # Megatron allocates the weight in its own dtype; it is freed at once.
        unquantised = self.weight
        self.weight = torch.nn.Parameter(
            torch.empty_like(unquantised, dtype=fp8_codes.DTYPE), requires_grad=False
        )
        vars(self.weight).update(vars(unquantised))  # Megatron's marks, such as the split dimension
        for name in ("weight_scale", "row_block", "column_block"):
            # Not persistent: `store` fills them, checkpoints do not.
            self.register_buffer(name, None, persistent=False)

    def store(
        self, mapping: Mapping, pieces: Sequence[Piece], fill: Callable[[Tensor], None]
    ) -> None:
        """Loads this rank's part of a weight; a `megatron_oprd.weights.load.Store`.

        Reduces the largest magnitude of each block over the (expert-)tensor-parallel group, whose
        ranks all call this for the same weight.
        """
        config: Any = self.config
        weight = torch.empty(
            self.weight.shape, dtype=config.params_dtype, device=self.weight.device
        )
        fill(weight)
        blocks = Blocks(mapping, pieces, self.weight_format)
        largest = blocks.largest_magnitudes(weight)
        if self.tp_group.size() > 1:
            # A block may be spread over ranks.
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.tp_group)
        scales = blocks.scales_of_part(largest / self.weight_format.largest)
        fp8_codes.encode(weight, scales, self.weight_format, out=self.weight.data)
        self.weight_scale = scales.values
        self.row_block, self.column_block = scales.row_block, scales.column_block

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.weight_scale is not None, "the weight was not loaded"
        scales = Scales(
            values=self.weight_scale, row_block=self.row_block, column_block=self.column_block
        )
        config: Any = self.config
        decoded = fp8_codes.decode(weight, scales, self.weight_format, config.params_dtype)
        return super()._forward_impl(input, decoded, *args, **kwargs)  # type: ignore[misc]


class FP8ColumnParallelLinear(_FP8Linear, ColumnParallelLinear):
    """Megatron's ColumnParallelLinear, its weight in FP8."""


class FP8RowParallelLinear(_FP8Linear, RowParallelLinear):
    """Megatron's RowParallelLinear, its weight in FP8."""


def with_fp8_linears(spec: Any, weight_format: WeightFormat) -> Any:
    """Copies a spec of Megatron's local modules, or a part of one, with FP8 linear layers."""
    fp8_classes = {
        ColumnParallelLinear: FP8ColumnParallelLinear,
        RowParallelLinear: FP8RowParallelLinear,
    }
    if isinstance(spec, type):
        if spec not in fp8_classes:
            return spec
        return ModuleSpec(module=fp8_classes[spec], params={"weight_format": weight_format})
    if isinstance(spec, partial):
        parts = {
            name: with_fp8_linears(part, weight_format) for name, part in spec.keywords.items()
        }
        return partial(spec.func, *spec.args, **parts)
    if dataclasses.is_dataclass(spec):
        instance: Any = spec
        parts = {
            field.name: with_fp8_linears(getattr(instance, field.name), weight_format)
            for field in dataclasses.fields(instance)
        }
        return dataclasses.replace(instance, **parts)
    return spec


def scale_bytes(chunks: Sequence[GPTModel]) -> int:
    """Bytes of the scales and block indices of all FP8 linear layers in ``chunks``."""
    return sum(
        buffer.nbytes
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, _FP8Linear)
        for buffer in module.buffers(recurse=False)
    )


def fp8_stores(chunks: Sequence[GPTModel]) -> dict[str, Store]:
    """Stores for the weights of the FP8 linear layers in ``chunks``, by parameter name."""
    stores = {
        id(module.weight): module.store
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, _FP8Linear)
    }
    return {
        name: stores[id(parameter)]
        for name, parameter in named_parameters(chunks).items()
        if id(parameter) in stores
    }
