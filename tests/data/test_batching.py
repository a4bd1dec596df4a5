import inspect
import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_oprd.data.batching import (
    MicroBatch,
    TeacherReading,
    collate,
    context_parallel_shares,
    merge,
    pack,
    teacher_batches,
    with_teacher,
)

CPU = torch.device("cpu")


def packed(lengths: list[int], **settings: Any) -> list[list[list[int]]]:
    defaults = {"max_tokens": 100, "micro_batch_size": None, "num_replicas": 1}
    return pack(lengths, **{**defaults, **settings})


def cost(batch: list[int], lengths: list[int]) -> int:
    return max(lengths[i] for i in batch) * len(batch)


def drawn_step(draw: random.Random) -> tuple[int, int, list[int]]:
    """The number of replicas, the multiple of a replica's micro-batches, and all lengths."""
    num_replicas, multiple = draw.randrange(1, 5), draw.choice([1, 1, 2, 3])
    count = num_replicas * multiple * draw.randrange(1, 8)
    return num_replicas, multiple, [draw.randrange(1, 130) for _ in range(count)]


def test_what_always_holds() -> None:
    draw = random.Random(0)
    for _ in range(500):
        num_replicas, multiple, lengths = drawn_step(draw)
        micro_batch_size = draw.choice([None, 1, 2, 5])
        max_tokens = draw.choice([1, 60, 100, 1000])
        settings = {
            "max_tokens": max_tokens,
            "micro_batch_size": micro_batch_size,
            "num_replicas": num_replicas,
            "multiple": multiple,
        }
        replicas = packed(lengths, **settings)
        batches = list(itertools.chain(*replicas))
        assert sorted(itertools.chain(*batches)) == list(range(len(lengths))), "each once"
        assert len(replicas) == num_replicas
        (count,) = {len(replica) for replica in replicas}
        assert count % multiple == 0
        for batch in batches:
            assert len(batch) == 1 or cost(batch, lengths) <= max_tokens
            assert micro_batch_size is None or len(batch) <= micro_batch_size
        assert packed(list(lengths), **settings) == replicas, "the same on every rank"


def test_sequences_of_similar_length_share_a_micro_batch() -> None:
    lengths = [10, 50, 11, 49, 9, 48]
    assert packed(lengths, max_tokens=150) == [[[1, 3, 5], [2, 0, 4]]]
    # 50 x 3 = 150 tokens with padding are one too many.
    assert packed(lengths, max_tokens=149) == [[[5, 2, 0], [1, 3], [4]]]


def test_no_more_micro_batches_than_the_budget_asks_for() -> None:
    assert packed([10] * 20, max_tokens=100) == [[list(range(10)), list(range(10, 20))]]
    assert packed([10] * 20, max_tokens=1000) == [[list(range(20))]]
    assert [len(batch) for batch in packed([10] * 20, max_tokens=1000, multiple=4)[0]] == [5] * 4


def test_a_sequence_longer_than_the_budget_is_one_by_itself() -> None:
    assert packed([500, 3, 2, 400], max_tokens=10) == [[[0], [3], [1, 2]]]


def test_replicas_get_about_the_same_work() -> None:
    draw = random.Random(1)
    for num_replicas in (2, 4):
        for _ in range(50):
            lengths = [draw.randrange(20, 400) for _ in range(16 * num_replicas)]
            replicas = packed(lengths, num_replicas=num_replicas, max_tokens=800)
            work = [sum(cost(batch, lengths) for batch in replica) for replica in replicas]
            # The largest micro-batch is what dealing back and forth can be off by.
            assert max(work) - min(work) <= 800
            assert max(work) < 1.25 * min(work)


@pytest.mark.parametrize(
    ("count", "num_replicas", "multiple"),
    [(0, 1, 1), (1, 2, 1), (3, 2, 1), (3, 1, 4), (6, 2, 2), (5, 5, 2)],
)
def test_sequences_that_cannot_be_dealt_out_evenly(
    count: int, num_replicas: int, multiple: int
) -> None:
    needed = num_replicas * multiple
    with pytest.raises(ValueError, match=f"{count} sequences .* need a multiple of {needed}"):
        packed([7] * count, num_replicas=num_replicas, multiple=multiple)


def states_of(micro_batch: MicroBatch) -> Tensor:
    assert micro_batch.weights is not None
    return micro_batch.weights.states


@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
def test_collate(multiple: int) -> None:
    sequences = [[5, 6, 7, 8, 9], [3, 4], [1, 2, 3], [2] * 8]
    weights = [torch.full((len(sequence),), 0.25 * (i + 1)) for i, sequence in enumerate(sequences)]
    first, second = collate(
        [[0, 2], [3]],
        sequences,
        weights,
        pad_to_multiple_of=multiple,
        device=CPU,
    )
    width = {1: 5, 2: 6, 4: 8, 8: 8}[multiple]
    padding = [0] * (width - 5)
    assert first.input.tokens.tolist() == [[5, 6, 7, 8, 9, *padding], [1, 2, 3, 0, 0, *padding]]
    assert states_of(first).tolist() == [[0.25] * 5 + padding, [0.75] * 3 + [0, 0, *padding]]
    assert first.input.position_ids.tolist() == [list(range(width))] * 2
    assert (first.index, first.input.num_tokens) == (0, 8)
    assert (first.input.tokens.dtype, states_of(first).dtype) == (torch.int64, torch.float32)
    assert (second.index, second.input.num_tokens, second.input.tokens.tolist()) == (
        1,
        8,
        [[2] * 8],
    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_context_parallel_shares_are_megatrons(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Megatron asks a process group only where there is one.
    for name in ("megatron.core.utils.get_pg_size", "torch.distributed.get_world_size"):
        monkeypatch.setattr(name, lambda group: group.size())
    for name in ("megatron.core.utils.get_pg_rank", "torch.distributed.get_rank"):
        monkeypatch.setattr(name, lambda group: group.rank())
    draw = torch.Generator().manual_seed(0)
    (whole,) = collate(
        [[0, 1]],
        [torch.randint(1, 90, (n,), generator=draw).tolist() for n in (13, 9)],
        [torch.rand(13, generator=draw), torch.rand(9, generator=draw)],
        pad_to_multiple_of=2 * size,
        device=CPU,
    )
    # megatron-core 0.19 asks for it.
    asked = inspect.signature(get_batch_on_this_cp_rank).parameters.keys() & {"is_hybrid_cp"}
    for rank in range(size):
        group = SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank)
        expected = get_batch_on_this_cp_rank(
            {
                "tokens": whole.input.tokens,
                "ids": whole.input.position_ids.clone(),
                "weights": states_of(whole),
                "cu_seqlens": None,
            },
            cp_group=group,
            **dict.fromkeys(asked, False),
        )
        (found,) = context_parallel_shares([whole], rank=rank, size=size)
        assert torch.equal(found.input.tokens, expected["tokens"])
        assert torch.equal(found.input.position_ids, expected["ids"])
        assert torch.equal(states_of(found), expected["weights"])
        assert (found.index, found.input.num_tokens) == (whole.index, whole.input.num_tokens)


def test_what_always_holds_of_micro_batches_together() -> None:
    draw = random.Random(1)
    for _ in range(500):
        num_replicas, multiple, lengths = drawn_step(draw)
        replicas = packed(lengths, num_replicas=num_replicas, multiple=multiple)
        max_tokens = draw.choice([100, 200, 1000])
        merged = merge(replicas, lengths, max_tokens=max_tokens, multiple=multiple)
        (count,) = {len(parts) for parts in merged}
        assert count % multiple == 0
        for batches, parts in zip(replicas, merged, strict=True):
            assert sorted(itertools.chain(*parts)) == list(range(len(batches))), "each once"
            for part in parts:
                together = [i for number in part for i in batches[number]]
                assert len(part) == 1 or cost(together, lengths) <= max_tokens


def test_micro_batches_of_similar_length_are_together() -> None:
    lengths = [10, 50, 11, 49]
    of_one = [[[0], [1], [2], [3]]]
    assert merge(of_one, lengths, max_tokens=100) == [[[1, 3], [2, 0]]]
    # 50 x 2 = 100 tokens are one too many, 49 x 2 are not.
    assert merge(of_one, lengths, max_tokens=99) == [[[1], [3, 2], [0]]]
    # Without padding three sequences fit.
    assert merge(of_one, lengths, max_tokens=110, is_padded=False) == [[[1, 3, 2], [0]]]


def test_every_replica_puts_as_many_together() -> None:
    """The second could have one; the first needs two."""
    lengths = [60, 60, 10, 10]
    assert merge([[[0], [1]], [[2], [3]]], lengths, max_tokens=100) == [[[0], [1]], [[0], [1]]]


@pytest.mark.parametrize("cp_size", [1, 2])
def test_pairs_of_micro_batches_together(cp_size: int) -> None:
    """Every pair has the same token on both sides, and what is shared is one tensor."""
    draw = torch.Generator().manual_seed(0)
    sequences = [torch.randint(1, 90, (n,), generator=draw).tolist() for n in (13, 9, 4, 6)]
    # -1 at every third position: not supervised.
    positions = [torch.where(torch.arange(len(s)) % 3 > 0, torch.arange(len(s)), -1)
                 for s in sequences]  # fmt: skip
    rows: dict[str, Any] = {"is_packed": False, "pad_to_multiple_of": 2 * cp_size, "device": CPU}
    batches = [[2], [0, 3], [1]]
    whole = with_teacher(
        collate(batches, sequences, **rows),
        batches,
        TeacherReading(sequences=sequences, positions=positions, output_positions=None),
        together=[[1, 2], [0]],
        **rows,
    )
    tokens: list[dict[int, list[int]]] = [{} for _ in whole]
    for rank in range(cp_size):
        shares = context_parallel_shares(whole, rank=rank, size=cp_size)
        assert [[m.index for m in one.members] for one in teacher_batches(shares)] == [[0], [1, 2]]
        for one, found in zip(shares, tokens, strict=True):
            assert one.other_input is not None
            pairs = one.other_input.pairs
            for ids, read in (
                (pairs.student, one.input.tokens),
                (pairs.teacher, one.other_input.input.tokens),
            ):
                own = (ids > pairs.first) & (ids <= pairs.first + pairs.count)
                for number, token in zip(ids[own].tolist(), read[own].tolist(), strict=True):
                    found.setdefault(number, []).append(token)
    for batch, found in zip(batches, tokens, strict=True):
        wanted = [s for i in batch for n, s in enumerate(sequences[i]) if n % 3 > 0]
        assert sorted(one for one, _ in found.values()) == sorted(wanted)
        assert all(one == other for one, other in found.values())


def test_packed() -> None:
    weights = [torch.tensor([0.0, 0.5]), torch.tensor([0.25, 0.0, 1.0])]
    (whole,) = collate(
        [[1, 0]],
        [[5, 6], [7, 8, 9]],
        weights,
        is_packed=True,
        pad_to_multiple_of=4,
        device=CPU,
    )
    assert whole.input.tokens.tolist() == [[7, 8, 9, 5, 6, 0, 0, 0]]
    assert whole.input.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert states_of(whole).tolist() == [[0.25, 0.0, 1.0, 0.0, 0.5, 0.0, 0.0, 0.0]]
    assert (whole.input.packed_lengths, whole.input.num_tokens) == ((3, 2, 3), 5)
    (without_padding,) = collate(
        [[0, 1]],
        [[5, 6], [7, 8, 9]],
        weights,
        is_packed=True,
        pad_to_multiple_of=5,
        device=CPU,
    )
    assert without_padding.input.packed_lengths == (2, 3)


def test_packed_sequences_count_what_they_are() -> None:
    lengths = [10, 6, 5, 3]
    assert packed(lengths, max_tokens=20) == [[[0, 1], [2, 3]]]
    assert packed(lengths, max_tokens=24, is_padded=False) == [[[0, 1, 2, 3]]]
    assert packed(lengths, max_tokens=20, is_padded=False) == [[[0, 1], [2, 3]]]
    assert packed(lengths, max_tokens=21, is_padded=False) == [[[0, 1, 2], [3]]]
