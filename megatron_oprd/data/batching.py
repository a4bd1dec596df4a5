"""A step's sequences -> micro-batches, the same number for every data-parallel replica."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oprd.place import context_parallel_positions


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences that go through a model together.

    Either they are padded on the right to one length s, or packed one behind the other in one row
    of s tokens (b = 1), of which those behind the last sequence are padding. Under context
    parallelism s is a rank's share.

    Attributes:
        index: Its number among this replica's micro-batches of the step.
        tokens: Token ids [b, s], int64; padding is 0.
        position_ids: [b, s], int64.
        weights: What each position counts for in the loss [b, s], fp32, on the CPU, where the
            supervised ones are picked out; 0 is not supervised.
        output_weights: The same for the output-space loss, whose positions are other ones: those
            that predict a response token; None without such a loss.
        labels: The token that follows each position [b, s], int64, on the CPU; 0 behind the last.
        num_tokens: Tokens that are not padding.
        packed_lengths: Tokens of each packed sequence, the padding among them as one more; None
            for padded sequences.
    """

    index: int
    tokens: Tensor
    position_ids: Tensor
    weights: Tensor
    output_weights: Tensor | None
    labels: Tensor
    num_tokens: int
    packed_lengths: tuple[int, ...] | None = None


def pack(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    micro_batch_size: int | None,
    num_replicas: int,
    multiple: int = 1,
    is_padded: bool = True,
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
        is_padded: Whether a micro-batch's sequences are padded to the longest of them.

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

    def cost(batch: list[int]) -> int:
        tokens = [lengths[i] for i in batch]
        return max(tokens) * len(batch) if is_padded else sum(tokens)

    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches:
            last = batches[-1]
            fits = cost([*last, index]) <= max_tokens
            if fits and (micro_batch_size is None or len(last) < micro_batch_size):
                last.append(index)
                continue
        batches.append([index])
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
    output_weights: Sequence[Tensor] | None = None,
    *,
    pad_to_multiple_of: int,
    device: torch.device,
) -> list[MicroBatch]:
    """Builds one replica's micro-batches.

    Args:
        batches: Indices of each micro-batch's sequences.
        sequences: Token ids of every sequence of the step.
        weights: Their position weights, each [length].
        output_weights: Those of the output-space loss, likewise; None without one.
        pad_to_multiple_of: Micro-batches are padded to a multiple of this many tokens (the
            tensor-parallel size under sequence parallelism).
        device: Where the tensors go.
    """
    micro_batches = []
    for index, batch in enumerate(batches):
        longest = max(len(sequences[i]) for i in batch)
        s = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
        tokens = _padded([torch.tensor(sequences[i]) for i in batch], s)
        micro_batches.append(
            MicroBatch(
                index=index,
                tokens=tokens.to(device),
                position_ids=torch.arange(s, device=device).expand(len(batch), s),
                weights=_padded([weights[i] for i in batch], s),
                output_weights=None
                if output_weights is None
                else _padded([output_weights[i] for i in batch], s),
                labels=_padded([_followers(sequences[i]) for i in batch], s),
                num_tokens=sum(len(sequences[i]) for i in batch),
            )
        )
    return micro_batches


def collate_packed(
    batches: Sequence[Sequence[int]],
    sequences: Sequence[Sequence[int]],
    weights: Sequence[Tensor],
    output_weights: Sequence[Tensor] | None = None,
    *,
    pad_to_multiple_of: int,
    device: torch.device,
) -> list[MicroBatch]:
    """Builds one replica's micro-batches of packed sequences; arguments as `collate`'s."""
    micro_batches = []
    for index, batch in enumerate(batches):
        lengths = [len(sequences[i]) for i in batch]
        padding = -sum(lengths) % pad_to_multiple_of
        s = sum(lengths) + padding
        packed_lengths = (*lengths, padding) if padding else tuple(lengths)

        def in_a_row(parts: Iterable[Tensor], s: int = s) -> Tensor:
            return _padded([torch.cat(list(parts))], s)

        micro_batches.append(
            MicroBatch(
                index=index,
                tokens=in_a_row(torch.tensor(sequences[i]) for i in batch).to(device),
                position_ids=torch.cat([torch.arange(n) for n in packed_lengths])[None].to(device),
                weights=in_a_row(weights[i] for i in batch),
                output_weights=None
                if output_weights is None
                else in_a_row(output_weights[i] for i in batch),
                labels=in_a_row(_followers(sequences[i]) for i in batch),
                num_tokens=sum(lengths),
                packed_lengths=packed_lengths,
            )
        )
    return micro_batches


def _followers(sequence: Sequence[int]) -> Tensor:
    """The token behind each token, 0 behind the last."""
    return torch.tensor([*sequence[1:], 0])


def _padded(rows: Sequence[Tensor], s: int) -> Tensor:
    """Rows of different lengths, padded with zeros on the right to [b, s]."""
    padded = rows[0].new_zeros(len(rows), s)
    for row, content in zip(padded, rows, strict=True):
        row[: len(content)] = content
    return padded


def context_parallel_share(micro_batch: MicroBatch, *, rank: int, size: int) -> MicroBatch:
    """What one context-parallel rank has of a micro-batch.

    Args:
        micro_batch: The whole of it, padded to a multiple of twice the ranks.
        rank: Rank in the context-parallel group.
        size: Size of the group.
    """
    positions = context_parallel_positions(micro_batch.tokens.shape[1], rank=rank, size=size)
    on_device = positions.to(micro_batch.tokens.device)
    return dataclasses.replace(
        micro_batch,
        tokens=micro_batch.tokens[:, on_device],
        position_ids=micro_batch.position_ids[:, on_device],
        weights=micro_batch.weights[:, positions],
        output_weights=None
        if micro_batch.output_weights is None
        else micro_batch.output_weights[:, positions],
        labels=micro_batch.labels[:, positions],
    )
