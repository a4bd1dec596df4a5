import pytest
import torch
from torch import Tensor

from megatron_oprd.data.batching import collate, context_parallel_shares
from megatron_oprd.distill.taps import Selection
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.training.batches import supervised_rows, target_groups

# 0 is not supervised: 3 of 6 tokens, 4 of 4, none of 2.
WEIGHTS = [
    torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 0.5]),
    torch.full((4,), 0.25),
    torch.zeros(2),
]


@pytest.mark.parametrize(
    ("batch", "split", "expected"),
    [
        ([0, 1, 2], ParallelLayout(), 7),
        # Padded to 6 tokens, slices of 3: none and 3 of the first, 3 and 1 of the second.
        ([0, 1], ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True), 4),
        # Padded to 8 tokens, slices of 2: 0, 1, 2, 0 and 2, 2, 0, 0.
        ([0, 1], ParallelLayout(tensor_model_parallel_size=4, sequence_parallel=True), 3),
        # Padded to 8 tokens; ranks have tokens 0, 1, 6, 7 and 2, 3, 4, 5: 0, 3 and 2, 2.
        ([0, 1], ParallelLayout(context_parallel_size=2), 5),
        ([2], ParallelLayout(), 0),
    ],
)
def test_rows_of_the_fullest_rank(batch: list[int], split: ParallelLayout, expected: int) -> None:
    assert supervised_rows(batch, WEIGHTS, split, is_packed=False) == expected


@pytest.mark.parametrize(("cp_size", "is_packed"), [(1, False), (2, False), (4, False), (1, True)])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("multiple", [1, 3])
def test_rows_are_those_that_the_ranks_select(
    cp_size: int, is_packed: bool, tp_size: int, multiple: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (5,), generator=draw).tolist()
    weights: list[Tensor] = [torch.rand(n, generator=draw).round() for n in lengths]
    split = ParallelLayout(
        context_parallel_size=cp_size,
        tensor_model_parallel_size=tp_size,
        sequence_parallel=True,
        token_multiple=multiple,
    )
    (whole,) = collate(
        [range(5)],
        [[7] * n for n in lengths],
        weights,
        is_packed=is_packed,
        pad_to_multiple_of=split.pad_to_multiple_of,
        device=torch.device("cpu"),
    )
    selected = []
    for cp_rank in range(cp_size):
        (share,) = context_parallel_shares([whole], rank=cp_rank, size=cp_size)
        assert share.input.tokens.shape[1] % (tp_size * multiple) == 0
        for tp_rank in range(tp_size):
            selection = Selection.of(share, tp_rank=tp_rank, tp_size=tp_size)
            selected.append(len(selection.index))
    assert sum(selected) == sum(int(w.sum()) for w in weights)
    assert supervised_rows(range(5), weights, split, is_packed=is_packed) == max(selected)


@pytest.mark.parametrize(
    ("rows", "max_bytes", "multiple", "expected"),
    [
        ([3, 3, 3], None, 1, [[0, 1, 2]]),
        ([3, 3, 3], 90, 1, [[0, 1, 2]]),
        ([3, 3, 3], 89, 1, [[0, 1], [2]]),
        ([1, 9, 1, 1], 30, 1, [[0], [1], [2, 3]]),  # the second needs 90 by itself
        ([2, 2, 2, 2, 2, 2], 85, 2, [[0, 1, 2, 3], [4, 5]]),
        ([2, 2, 2, 2], 10, 2, [[0, 1], [2, 3]]),
        ([0, 0, 0], 1, 1, [[0, 1, 2]]),
    ],
)
def test_groups(
    rows: list[int], max_bytes: float | None, multiple: int, expected: list[list[int]]
) -> None:
    groups = target_groups([10 * count for count in rows], max_bytes=max_bytes, multiple=multiple)
    assert [list(group) for group in groups] == expected
