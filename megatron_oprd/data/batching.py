"""A step's sequences -> micro-batches, the same number for every data-parallel replica."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences that go through a model together, padded on the right.

    Attributes:
        index: Its number among this replica's micro-batches of the step.
        tokens: Token ids [b, s], int64; padding is 0.
        position_ids: [b, s], int64.
        weights: What each position counts for in the loss [b, s], fp32, on the CPU, where the
            supervised ones are picked out; 0 is not supervised.
        num_tokens: Tokens that are not padding.
    """

    index: int
    tokens: Tensor
    position_ids: Tensor
    weights: Tensor
    num_tokens: int


def pack(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    micro_batch_size: int | None,
    num_replicas: int,
    multiple: int = 1,
) -> list[list[list[int]]]:
    """Divides sequences into micro-batches, and these over the replicas.

    Sequences are sorted by length, so that those of a micro-batch need little padding, and filled
    in up to the token budget. The largest micro-batches are then halved until every replica gets
    the same number of them, and they are dealt out so that replicas get about the same tokens.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Budget of a micro-batch, padding included. A longer sequence is one by itself.
        micro_batch_size: Sequences of a micro-batch at most; None is no limit.
        num_replicas: Data-parallel replicas.
        multiple: The number of a replica's micro-batches is a multiple of this.

    Returns:
        For each replica its micro-batches, each a list of indices into ``lengths``.

    Raises:
        ValueError: The number of sequences is not a positive multiple of ``num_replicas`` times
            ``multiple``: micro-batches of one sequence could then not be dealt out evenly.
    """
    per_round = num_replicas * multiple
    if not lengths or len(lengths) % per_round:
        raise ValueError(
            f"{len(lengths)} sequences; {num_replicas} replicas with a multiple of {multiple} "
            f"micro-batches each need a multiple of {per_round}"
        )
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches:
            last = batches[-1]
            fits = lengths[last[0]] * (len(last) + 1) <= max_tokens
            if fits and (micro_batch_size is None or len(last) < micro_batch_size):
                last.append(index)
                continue
        batches.append([index])

    def cost(batch: list[int]) -> int:
        return lengths[batch[0]] * len(batch)

    while len(batches) % per_round:
        largest = max((b for b in batches if len(b) > 1), key=cost)
        batches.remove(largest)
        half = len(largest) // 2
        batches += [largest[:half], largest[half:]]
    batches.sort(key=cost, reverse=True)
    replicas: list[list[list[int]]] = [[] for _ in range(num_replicas)]
    for start in range(0, len(batches), num_replicas):
        # Back and forth: whoever got the largest of one round gets the smallest of the next.
        deal = batches[start : start + num_replicas]
        if start // num_replicas % 2:
            deal.reverse()
        for replica, batch in zip(replicas, deal, strict=True):
            replica.append(batch)
    return replicas


def collate(
    batches: Sequence[Sequence[int]],
    sequences: Sequence[Sequence[int]],
    weights: Sequence[Tensor],
    *,
    pad_to_multiple_of: int,
    device: torch.device,
) -> list[MicroBatch]:
    """Builds one replica's micro-batches.

    Args:
        batches: Indices of each micro-batch's sequences.
        sequences: Token ids of every sequence of the step.
        weights: Their position weights, each [length].
        pad_to_multiple_of: Micro-batches are padded to a multiple of this many tokens (the
            tensor-parallel size under sequence parallelism).
        device: Where the tensors go.
    """
    micro_batches = []
    for index, batch in enumerate(batches):
        longest = max(len(sequences[i]) for i in batch)
        s = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
        tokens = torch.zeros(len(batch), s, dtype=torch.int64)
        weight = torch.zeros(len(batch), s)
        for row, i in enumerate(batch):
            tokens[row, : len(sequences[i])] = torch.tensor(sequences[i])
            weight[row, : len(sequences[i])] = weights[i]
        micro_batches.append(
            MicroBatch(
                index=index,
                tokens=tokens.to(device),
                position_ids=torch.arange(s, device=device).expand(len(batch), s),
                weights=weight,
                num_tokens=sum(len(sequences[i]) for i in batch),
            )
        )
    return micro_batches
