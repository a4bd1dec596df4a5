from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from megatron_oprd.config.schema import Positions
from megatron_oprd.distill.positions import position_mask

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "oprd_reference.safetensors"

# Padding on the left, a hole, padding on the right; nothing at all; one token; all tokens.
RESPONSES = [
    [0, 1, 1, 0, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 1, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 1, 1, 1],
]


def test_masks_of_the_reference_implementation() -> None:
    tensors = load_file(GOLDEN)
    masks = [key for key in tensors if ".mask." in key]
    assert masks
    for key in masks:
        case, _, positions, k = key.split(".")
        measured = position_mask(tensors[f"{case}.response_mask"], positions, int(k))
        assert torch.equal(measured, tensors[key]), key


def written_out(row: list[int], positions: str, k: int | None) -> list[int]:
    valid = [column for column, value in enumerate(row) if value]
    chosen = {
        "all": valid,
        "last": valid[-1:],
        "last_k": valid[-k:] if k else [],
        "first_k": valid[:k],
    }[positions]
    return [int(column in chosen) for column in range(len(row))]


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("positions", "k"),
    [
        ("all", None),
        ("last", None),
        ("last", 3),
        *(("last_k", k) for k in (1, 2, 3, 4, 7, 8, 100)),
        *(("first_k", k) for k in (1, 2, 3, 4, 7, 8, 100)),
    ],
)
def test_valid_tokens_are_counted(positions: Any, k: int | None, dtype: torch.dtype) -> None:
    mask = position_mask(torch.tensor(RESPONSES, dtype=dtype), positions, k)
    assert mask.dtype == dtype
    assert mask.long().tolist() == [written_out(row, positions, k) for row in RESPONSES]


def test_the_given_mask_is_left_alone() -> None:
    given = torch.tensor(RESPONSES)
    for positions in get_args(Positions):
        position_mask(given, positions, 2).fill_(9)
    assert given.tolist() == RESPONSES


@pytest.mark.parametrize("positions", ["last_k", "first_k"])
@pytest.mark.parametrize("k", [None, 0, -1])
def test_k_is_needed(positions: Any, k: int | None) -> None:
    with pytest.raises(ValueError, match=f"'{positions}' and k is {k}; k must be 1 or more"):
        position_mask(torch.tensor(RESPONSES), positions, k)


def test_unknown_positions() -> None:
    with pytest.raises(ValueError, match="'middle'; it must be one of: all, last, last_k, first_k"):
        position_mask(torch.tensor(RESPONSES), "middle", 1)  # type: ignore[arg-type]
