import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_oprd.weights import casting
from megatron_oprd.weights.casting import count_overflows, overflow_error
from megatron_oprd.weights.hf_files import HFCheckpoint

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Just below and above where values of float16 and bfloat16 are rounded to infinity, and others.
VALUES = [
    0.0, 1.0, 65504.0, 65519.9, 65520.0, 70000.0, 3.3e38, 3.3961775e38, 3.4e38, 1e300,
    torch.inf, torch.nan,
]  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("stored", "dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_one_value_at_a_time(stored: torch.dtype, dtype: torch.dtype, sign: int) -> None:
    for value in VALUES:
        values = torch.tensor([0.5, sign * value], dtype=torch.float64).to(stored)
        before, after = values.double(), values.to(dtype).double()
        expected = sum(
            abs(x) < torch.inf and abs(y) == torch.inf
            for x, y in zip(before.tolist(), after.tolist(), strict=True)
        )
        assert count_overflows(values, dtype) == expected, value


def test_what_has_no_large_values() -> None:
    assert count_overflows(torch.empty(0, 3), torch.float16) == 0
    assert count_overflows(torch.tensor([2**40]), torch.float16) == 0
    assert count_overflows(torch.tensor(1e5), torch.float16) == 1
    mixed = torch.tensor([[torch.nan, 1e5], [-1e6, -torch.inf]])
    assert count_overflows(mixed, torch.float16) == 2


@pytest.mark.parametrize(
    ("stored", "largest", "dtype", "message"),
    [
        (torch.float32, -1e6, torch.float16, r"is 1e\+06, and float16 ends at 65504\. .* give "
         r"bfloat16 or float32\."),
        (torch.float32, 3.4e38, torch.bfloat16, r"is 3\.4e\+38, and bfloat16 ends at 3\.38953e\+38"
         r".* give float32\."),
        (torch.float64, 1e300, torch.float32, r"is 1e\+300, and float32 ends .* leave it out\."),
    ],
)  # fmt: skip
def test_the_error_is_about_all_of_the_tensor(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype,
    largest: float,
    dtype: torch.dtype,
    message: str,
) -> None:
    monkeypatch.setattr(casting, "ROWS_BYTES", 8)
    values = torch.ones(5, 2, dtype=stored)
    values[1, 0] = largest * 0.9999
    values[3, 1] = largest
    (tmp_path / "config.json").write_text(json.dumps({}))
    save_file({"w": values}, tmp_path / "model.safetensors")
    error = overflow_error(HFCheckpoint(tmp_path), "w", dtype)
    assert re.search(f"has 2 finite values in w that .* {message}", str(error))
