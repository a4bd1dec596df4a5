"""Distributions over a vocabulary whose columns are divided over tensor-parallel ranks.

Shape suffixes: n positions, v this rank's columns, k tokens of a support.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class VocabularyShard:
    """This rank's columns of the vocabulary, those that only pad it left out.

    Attributes:
        start: The first column.
        size: Columns; may be 0 on the last ranks of a very small vocabulary.
        group: The ranks that share the vocabulary (tensor-parallel).
    """

    start: int
    size: int
    group: dist.ProcessGroup

    @classmethod
    def of(
        cls, *, vocab_size: int, padded_vocab_size: int, group: dist.ProcessGroup
    ) -> "VocabularyShard":
        """This rank's part of the first ``vocab_size`` of ``padded_vocab_size`` columns."""
        width = padded_vocab_size // group.size()
        start = group.rank() * width
        return cls(start=start, size=min(max(vocab_size - start, 0), width), group=group)

    def sum(self, value: Tensor) -> Tensor:
        """Adds ``value``, of any shape, up over the ranks, in place."""
        if self.group.size() > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def max(self, value: Tensor) -> Tensor:
        """The largest of each element over the ranks, in place."""
        if self.group.size() > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value


def log_softmax(logits: Tensor, shard: VocabularyShard) -> Tensor:
    """Log-probabilities of this rank's columns, normalised over all ranks': [n, v] --> [n, v].

    Two sums of [n] go over the shard's group.
    """
    no_column = logits.new_full((len(logits), 1), -torch.inf)
    largest = (logits if shard.size else no_column).amax(dim=1)
    centred = logits - shard.max(largest)[:, None]
    return centred - shard.sum(centred.exp().sum(dim=1)).log()[:, None]


def gather(values: Tensor, ids: Tensor, shard: VocabularyShard) -> Tensor:
    """The values of chosen columns, whichever rank has them.

    Args:
        values: [n, v].
        ids: Columns of the whole vocabulary [n, k], int64, the same on every rank.
        shard: This rank's columns.

    Returns:
        [n, k].
    """
    local, is_here = _local(ids, shard)
    found = values.new_zeros(ids.shape)
    if shard.size:
        found = torch.where(is_here, values.gather(1, local), 0)
    return shard.sum(found)


def scatter(values: Tensor, ids: Tensor, shard: VocabularyShard) -> Tensor:
    """Puts values into their columns, where they are this rank's: [n, k] --> [n, v].

    A column that is named twice gets the sum.
    """
    local, is_here = _local(ids, shard)
    result = values.new_zeros(len(ids), shard.size)
    if shard.size:
        result.scatter_add_(1, local, torch.where(is_here, values, 0))
    return result


def top_k(values: Tensor, k: int, shard: VocabularyShard) -> Tensor:
    """The columns with the k largest values over all ranks: [n, v] --> [n, k], largest first.

    ``k`` values and columns of each rank go over the shard's group.
    """
    here = min(k, shard.size)
    best, ids = values.topk(here, dim=1)
    ids = ids + shard.start
    size = shard.group.size()
    if size == 1:
        return ids
    best = torch.nn.functional.pad(best, (0, k - here), value=-torch.inf)
    ids = torch.nn.functional.pad(ids, (0, k - here))
    all_best = [torch.empty_like(best) for _ in range(size)]
    all_ids = [torch.empty_like(ids) for _ in range(size)]
    dist.all_gather(all_best, best.contiguous(), group=shard.group)
    dist.all_gather(all_ids, ids.contiguous(), group=shard.group)
    chosen = torch.cat(all_best, dim=1).topk(k, dim=1).indices
    return torch.cat(all_ids, dim=1).gather(1, chosen)


def _local(ids: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Columns counted from this rank's first, 0 for those of others, and which are this rank's."""
    local = ids - shard.start
    is_here = (local >= 0) & (local < shard.size)
    return torch.where(is_here, local, 0), is_here
