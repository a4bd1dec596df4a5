"""The share of a model's parameters, and of a sequence, that a rank holds, as plain numbers."""

from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Place:
    """A rank's place in the groups that shard parameters within a layer; needs no process group."""

    # Tensor parallelism shards all parameters except the experts'.
    tp_rank: int = 0
    tp_size: int = 1
    # Expert-tensor parallelism shards each expert.
    etp_rank: int = 0
    etp_size: int = 1
    # Expert parallelism distributes a layer's experts.
    ep_rank: int = 0
    ep_size: int = 1


@dataclass(frozen=True, kw_only=True)
class SequenceSplit:
    """How the ranks of a replica share a padded sequence between a layer's parallel regions."""

    cp_size: int
    # The tensor-parallel size under sequence parallelism, else 1.
    tp_size: int
    multiple: int = 1  # of tokens on each rank

    @property
    def pad_to_multiple_of(self) -> int:
        """Sequences are padded to a multiple of this many tokens."""
        # Zigzag context parallelism needs two equal chunks on each rank.
        return self.cp_size * lcm(self.tp_size * self.multiple, 2 if self.cp_size > 1 else 1)

    def largest_share(self, counts: Tensor) -> int:
        """The sum of ``counts`` ([s] before padding, by position) on the rank that has most."""
        length = -(-len(counts) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = torch.nn.functional.pad(counts, (0, length - len(counts)))
        shares = [
            int(share.sum())
            for rank in range(self.cp_size)
            for share in padded[
                context_parallel_positions(length, rank=rank, size=self.cp_size)
            ].chunk(self.tp_size)
        ]
        return max(shares)


def context_parallel_positions(seq_len: int, *, rank: int, size: int) -> Tensor:
    """The positions of a sequence that a context-parallel rank holds, [s/cp], int64.

    Megatron's zigzag: the ``rank``-th of 2 cp equal chunks from either end, which balances causal
    attention. ``seq_len`` is a multiple of 2 cp, except for ``size`` 1.
    """
    positions = torch.arange(seq_len)
    if size == 1:
        return positions
    chunks = positions.chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
