"""FP8 codes and scales against the formulas, number by number."""

import math

import pytest
import torch
from torch import Tensor

from megatron_oprd.models import fp8_codes
from megatron_oprd.models.fp8_codes import FORMATS, Scales, WeightFormat, decode, encode
from tests.helpers.closeness import assert_close_relative

EPS = 1 / 8
FINITE = [code for code in range(256) if code & 0x7F != 0x7F]
EACH_FORMAT = pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)


def number(code: int) -> float:
    """The E4M3 number of a byte: sign, 4 bits of exponent with a bias of 7, 3 of mantissa."""
    exponent, mantissa = code >> 3 & 0xF, code & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if code & 0x80 else size


def weight_of(code: int, scale: float, *, logarithmic: bool) -> float:
    """The weight that a byte stands for."""
    stored = number(code)
    if not logarithmic:
        return scale * stored
    return math.copysign(scale * math.log1p(abs(stored) / EPS), stored)


def by_row(weight: Tensor, weight_format: WeightFormat) -> Scales:
    largest = weight.abs().amax(dim=1, keepdim=True).float()
    return Scales(values=largest / weight_format.largest, row_block=None, column_block=None)


def stored(weight: Tensor, scales: Scales, weight_format: WeightFormat) -> Tensor:
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    encode(weight, scales, weight_format, out)
    return out


def relative_error(weight: Tensor, weight_format: WeightFormat) -> float:
    scales = by_row(weight, weight_format)
    decoded = decode(
        stored(weight, scales, weight_format), scales, weight_format, dtype=torch.float32
    )
    return float((decoded - weight).norm() / weight.norm())


@EACH_FORMAT
def test_every_code(weight_format: WeightFormat) -> None:
    codes = torch.tensor([FINITE, FINITE], dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = Scales(values=torch.tensor([[0.01], [3.0]]), row_block=None, column_block=None)
    weight = decode(codes, scales, weight_format, torch.float32)
    expected = [
        [weight_of(code, scale, logarithmic=weight_format.logarithmic) for code in FINITE]
        for scale in (0.01, 3.0)
    ]
    torch.testing.assert_close(weight, torch.tensor(expected), rtol=1e-6, atol=0)
    again = stored(weight, scales, weight_format)
    assert torch.equal(again.float(), codes.float())


@EACH_FORMAT
def test_a_weight_goes_to_a_nearest_code(weight_format: WeightFormat) -> None:
    """No other code's weight is closer, but for the rounding at half a step of a logarithm."""
    weight = torch.linspace(-1.0, 1.0, 4001)[None]
    scales = by_row(weight, weight_format)
    found = decode(stored(weight, scales, weight_format), scales, weight_format, torch.float32)
    scale = float(scales.values)
    values = torch.tensor(
        [weight_of(code, scale, logarithmic=weight_format.logarithmic) for code in FINITE]
    )
    nearest = (weight[0, :, None] - values).abs().amin(dim=1)
    # Steps of two neighbours differ by at most a half where the exponent changes.
    assert ((found - weight).abs()[0] <= 1.1 * nearest + 1e-6).all()
    assert float(found[0, -1]) == pytest.approx(1.0, rel=1e-6), "the largest stays as it is"


def test_error_of_normal_weights() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    errors = {name: relative_error(weight, fmt) for name, fmt in FORMATS.items()}
    # Evenly distributed between steps of 1/8 to 1/16 of the number.
    assert errors["per_channel"] == pytest.approx(0.0265, rel=0.03)
    assert errors["per_channel_log"] == pytest.approx(0.0084, rel=0.03)


@EACH_FORMAT
def test_zeros_and_outliers(weight_format: WeightFormat) -> None:
    weight = torch.zeros(3, 4)
    weight[1, 2], weight[2, 0], weight[2, 1] = -1e30, 5.0, 1e-3
    scales = by_row(weight, weight_format)
    decoded = decode(stored(weight, scales, weight_format), scales, weight_format, torch.float32)
    assert torch.equal(decoded[0], torch.zeros(4))
    # The smallest steps are 2^-9 of what is stored.
    smallest = weight_of(1, 1.0, logarithmic=weight_format.logarithmic) / weight_format.largest
    torch.testing.assert_close(decoded[1], weight[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(decoded[2], weight[2], rtol=1 / 16, atol=5.0 * smallest / 2)


@EACH_FORMAT
def test_rows_at_a_time(weight_format: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 10, generator=generator)
    scales = Scales(
        values=torch.rand(5, 2, generator=generator) + 1,
        row_block=(torch.arange(37) // 8).int(),
        column_block=(torch.arange(10) // 5).int(),
    )
    whole = stored(weight, scales, weight_format)
    assert scales.of_rows(9, 11).equal(scales.values[1].repeat_interleave(5).expand(2, 10))
    monkeypatch.setattr(fp8_codes, "ELEMENTS_AT_A_TIME", 40)
    # A kernel may round the tail of a piece otherwise: to the next code, an eighth further.
    codes = stored(weight, scales, weight_format).float()
    assert bool(((codes - whole.float()).abs() <= whole.float().abs() / 8).all())
    in_parts = decode(whole, scales, weight_format, torch.float32)
    monkeypatch.undo()
    assert_close_relative(in_parts, decode(whole, scales, weight_format, torch.float32), 1e-6)


def test_codes_of_a_checkpoint_in_the_same_blocks_are_kept() -> None:
    """Weights published in FP8 with 128 x 128 scales, read in bf16, and stored with block_128.

    The largest code of a block is the format's largest, as quantisers make it. Then the codes are
    the published ones, and the scales are off by what bf16 rounds.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 384, generator=generator)
    rows, columns = (torch.arange(size) // 128 for size in weight.shape)

    def of_blocks(matrix: Tensor) -> Scales:
        largest = matrix.float().abs().unflatten(0, (2, 128)).unflatten(2, (3, 128)).amax((1, 3))
        return Scales(values=largest / 448, row_block=rows.int(), column_block=columns.int())

    published = of_blocks(weight)
    spread = published.values[rows][:, columns]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    values = (codes.float() * spread).bfloat16()
    again = stored(values, of_blocks(values), FORMATS["block_128"])
    assert torch.equal(again.float(), codes.float())
    found = decode(again, of_blocks(values), FORMATS["block_128"], dtype=torch.float32)
    difference = (found - codes.float() * spread).abs() / (codes.float() * spread).abs()
    assert 0 < float(difference.nan_to_num().max()) <= 2.0**-8
    # Scales of rows would round most weights to other numbers.
    error = (values.float() - codes.float() * spread).norm() / weight.norm()
    assert relative_error(values, FORMATS["per_channel_log"]) > 2 * float(error)
