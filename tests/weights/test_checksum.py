import pytest
import torch
import xxhash

from megatron_oprd.weights.checksum import Checksum, checksum, examine


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool],
)
def test_checksums_are_of_the_bytes(dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, (6, 4)).to(dtype)
    expected = xxhash.xxh3_128_hexdigest(bytes(tensor.flatten().view(torch.uint8).tolist()))
    assert checksum(tensor) == expected
    assert checksum(tensor.T.contiguous().T) == expected
    pieces = Checksum()
    for row in tensor:
        pieces.update(row)
    assert pieces.hexdigest() == expected
    assert checksum(tensor[0, 0]) == checksum(tensor[0, :1])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64]
)
def test_examine(dtype: torch.dtype) -> None:
    large = torch.ones(2**20 + 5).to(dtype)  # more than is looked at at a time
    is_float = large.is_floating_point()
    if is_float:
        large[[0, -1]] = torch.tensor([torch.nan, torch.nan]).to(dtype)
    assert examine(large) == (checksum(large), 2 if is_float else 0)
    assert examine(large[:0]) == (checksum(large[:0]), 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_infinities_are_no_nans(dtype: torch.dtype, sign: int) -> None:
    limits = torch.finfo(dtype)
    values = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, limits.max, limits.min], dtype=dtype)
    assert examine(values)[1] == 0
    nan = torch.copysign(torch.tensor(torch.nan, dtype=dtype), torch.tensor(sign, dtype=dtype))
    assert examine(torch.cat([values, nan[None]]))[1] == 1
    assert examine(nan)[1] == 1
