"""Linear layers of a frozen model with weights in FP8, without Transformer Engine.

They are Megatron's local linear layers but for the weight, which is stored as
`megatron_oprd.models.fp8_codes` says and decoded whenever the layer runs: on any device, and
without rounding activations, so that numbers do not depend on how a layer is split. The scales are
those of whole Hugging Face tensors, whatever part of them a rank holds.

torch._scaled_mm would multiply FP8 numbers directly, but rounds activations as well: with scales by
token and by channel the lowest cosine of SmolLM2's layers is 0.993, instead of 0.996 with rounded
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
    """The blocks of the whole weight, and those of one rank's part of it.

    Each Hugging Face tensor of the weight is divided into blocks by itself, from its first row and
    column on, so that blocks do not depend on how ranks share the weight. Their rows of blocks are
    counted through from tensor to tensor.

    Args:
        mapping: The weight's.
        pieces: The rank's part.
        weight_format: Says the size of a block.
    """

    def __init__(
        self, mapping: Mapping, pieces: Sequence[Piece], weight_format: WeightFormat
    ) -> None:
        self._format = weight_format
        (columns,) = {columns for _, columns in mapping.hf.values()}
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
        self._columns = slice(int(self._column_of[0]), int(self._column_of[-1]) + 1)
        # Where one column of blocks ends and the next begins in the rank's part.
        ends = [min(max(end - start, 0), stop - start) for end in range(0, columns + width, width)]
        self._runs = [slice(*run) for run in pairwise(sorted(set(ends)))]

    def largest_magnitudes(self, weight: Tensor) -> Tensor:
        """The largest magnitude of the rank's weights in each block of the whole weight.

        Args:
            weight: The rank's part, [out, in].

        Returns:
            [rows of blocks, columns of blocks], fp32; 0 where the rank has nothing of a block.
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
        """The scales of the rank's part.

        Args:
            whole: Those of the whole weight, as `largest_magnitudes` orders them.
        """
        device = whole.device
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
    """What both kinds of linear layers have in common; comes before Megatron's class."""

    weight: torch.nn.Parameter
    weight_scale: Tensor | None
    row_block: Tensor | None
    column_block: Tensor | None
    tp_group: dist.ProcessGroup

    def __init__(self, *args: Any, weight_format: WeightFormat, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_format = weight_format
        # Megatron allocates the weight in its own dtype; that one goes at once.
        unquantised = self.weight
        self.weight = torch.nn.Parameter(
            torch.empty_like(unquantised, dtype=fp8_codes.DTYPE), requires_grad=False
        )
        vars(self.weight).update(vars(unquantised))  # Megatron's marks
        for name in ("weight_scale", "row_block", "column_block"):
            self.register_buffer(name, None, persistent=False)

    def store(
        self, mapping: Mapping, pieces: Sequence[Piece], fill: Callable[[Tensor], None]
    ) -> None:
        """Takes over this rank's part of a weight; see `megatron_oprd.weights.load.Store`.

        Communicates the largest magnitude of each block over the (expert-)tensor-parallel group,
        all of whose ranks call for the same weight.
        """
        config: Any = self.config
        weight = torch.empty(
            self.weight.shape, dtype=config.params_dtype, device=self.weight.device
        )
        fill(weight)
        blocks = Blocks(mapping, pieces, self.weight_format)
        largest = blocks.largest_magnitudes(weight)
        if self.tp_group.size() > 1:
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
    """A copy of a layer spec of Megatron's local modules, with the linear layers above.

    Args:
        spec: The spec, or a part of it.
        weight_format: How their weights are stored.
    """
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
    """Bytes of the scales of the FP8 linear layers of ``chunks``, and of what belongs to them."""
    return sum(
        buffer.nbytes
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, _FP8Linear)
        for buffer in module.buffers(recurse=False)
    )


def fp8_stores(chunks: Sequence[GPTModel]) -> dict[str, Store]:
    """What loads the weights of the FP8 linear layers of ``chunks``, by parameter name."""
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
