"""Scales belong to blocks of the Hugging Face tensors, however ranks share them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_oprd.models.fp8 import Blocks
from megatron_oprd.models.fp8_codes import FORMATS, WeightFormat, decode, encode
from megatron_oprd.weights.mapping import QKV, GatedMLP, Mapping, RowSplit

# No width is a multiple of 128, and no rank's share of one is.
HIDDEN = 200
HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_query_groups": 4, "head_dim": 24}
MAPPINGS: dict[str, Mapping] = {
    "qkv": QKV(
        megatron="qkv", hf={"q": (192, HIDDEN), "k": (96, HIDDEN), "v": (96, HIDDEN)}, **HEADS
    ),
    "fused_qkv": QKV(megatron="qkv", hf={"qkv": (384, HIDDEN)}, **HEADS),
    "gated_mlp": GatedMLP(megatron="fc1", hf={"gate": (360, HIDDEN), "up": (360, HIDDEN)}),
    "row_split": RowSplit(megatron="fc2", hf={"down": (HIDDEN, 360)}),
}
EACH_MAPPING = pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)
EACH_FORMAT = pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)


def tensors_of(mapping: Mapping) -> dict[str, Tensor]:
    """Random tensors whose rows and columns differ in size."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        * torch.linspace(0.5, 2.0, shape[0])[:, None]
        * torch.linspace(1.0, 3.0, shape[1])
        for name, shape in mapping.hf.items()
    }


def expected_scales(tensor: Tensor, weight_format: WeightFormat) -> Tensor:
    """The scale of every weight of a tensor, block by block, [rows, columns]."""
    rows, columns = tensor.shape
    height, width = weight_format.block_rows, weight_format.block_columns or columns
    top = math.log1p(448 * 8) if weight_format.logarithmic else 448.0
    scales = torch.empty_like(tensor)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            block = (slice(row, row + height), slice(column, column + width))
            scales[block] = tensor[block].abs().max() / top
    return scales


@EACH_FORMAT
@EACH_MAPPING
@pytest.mark.parametrize("size", [1, 2, 4])
def test_scales(mapping: Mapping, weight_format: WeightFormat, size: int) -> None:
    tensors = tensors_of(mapping)
    parts = []
    for rank in range(size):
        weight = torch.full(mapping.local_shape(size), torch.nan)
        for piece in mapping.pieces(rank, size):
            assert piece.hf is not None
            weight[piece.local_index] = tensors[piece.hf][piece.hf_index]
        parts.append((weight, Blocks(mapping, mapping.pieces(rank, size), weight_format)))
    # What the ranks find out together.
    largest = torch.stack([blocks.largest_magnitudes(weight) for weight, blocks in parts]).amax(0)
    expected = {name: expected_scales(t, weight_format) for name, t in tensors.items()}
    for rank, (weight, blocks) in enumerate(parts):
        scales = blocks.scales_of_part(largest / weight_format.largest)
        found = scales.of_rows(0, len(weight)).expand_as(weight)
        stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        encode(weight, scales, weight_format, stored)
        decoded = decode(stored, scales, weight_format, torch.float32)
        for piece in mapping.pieces(rank, size):
            assert piece.hf is not None
            torch.testing.assert_close(
                found[piece.local_index],
                expected[piece.hf][piece.hf_index],
                rtol=1e-6,
                atol=0,
            )
        assert float((decoded - weight).norm() / weight.norm()) < 0.03


@EACH_FORMAT
def test_scales_take_little(weight_format: WeightFormat) -> None:
    mapping = GatedMLP(megatron="fc1", hf={"gate": (1024, 512), "up": (1024, 512)})
    blocks = Blocks(mapping, mapping.pieces(1, 2), weight_format)
    scales = blocks.scales_of_part(torch.ones(2048, 1) if weight_format.block_rows == 1
                                   else torch.ones(16, 4))  # fmt: skip
    tensors = [scales.values, scales.row_block, scales.column_block]
    size = sum(t.nbytes for t in tensors if t is not None)
    # A rank keeps the scales of its own rows: 4 bytes a row, and hardly more for blocks.
    assert size <= 1024 * 4 + (0 if weight_format.block_rows == 1 else 512 * 4 + 8 * 4 * 4)
    assert all(t.is_contiguous() for t in tensors if t is not None)
