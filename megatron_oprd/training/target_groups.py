"""Groups of micro-batches whose teacher targets fit into a memory budget."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_oprd.place import SequenceSplit


def supervised_rows(
    batch: Sequence[int], weights: Sequence[Tensor], split: SequenceSplit, *, is_packed: bool
) -> int:
    """Supervised positions of a micro-batch on the rank that has most of them.

    Args:
        batch: Indices of its sequences.
        weights: Position weights of every sequence of the step, each [length]; 0 is not supervised.
        split: How the ranks share the sequences.
        is_packed: Whether they lie one behind the other.
    """
    if is_packed:
        return split.largest_share(torch.cat([weights[i] > 0 for i in batch]).long())
    counts = torch.zeros(max(len(weights[i]) for i in batch), dtype=torch.int64)
    for i in batch:
        counts[: len(weights[i])] += weights[i] > 0
    return split.largest_share(counts)


def target_groups(sizes: Sequence[int], *, max_bytes: float | None, multiple: int) -> list[range]:
    """Divides micro-batches into consecutive groups whose targets take at most ``max_bytes``.

    Args:
        sizes: Bytes of each micro-batch's targets.
        max_bytes: The budget; None is one group. ``multiple`` micro-batches that need more by
            themselves are a group nevertheless.
        multiple: The size of a group is a multiple of this, as the number of micro-batches is.
    """
    if max_bytes is None:
        return [range(len(sizes))]
    ends, in_group = [0], 0
    for start in range(0, len(sizes), multiple):
        more = sum(sizes[start : start + multiple])
        if in_group and in_group + more > max_bytes:
            ends.append(start)
            in_group = 0
        in_group += more
    return [range(start, end) for start, end in zip(ends, [*ends[1:], len(sizes)], strict=True)]
