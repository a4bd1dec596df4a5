"""Which share of a model's parameters, and of a sequence, a rank holds, as plain numbers."""

from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Place:
    """A rank's place in the groups that split parameters; no process is needed to name one.

    Which layers a rank has is the pipeline's business and not part of it.

    Attributes:
        tp_rank: Rank in the tensor-parallel group, over which all parameters but the experts' are
            split.
        tp_size: Size of that group.
        etp_rank: Rank in the expert-tensor-parallel group, over which each expert is split.
        etp_size: Size of that group.
        ep_rank: Rank in the expert-parallel group, over which a layer's experts are dealt out.
        ep_size: Size of that group.
    """

    tp_rank: int = 0
    tp_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1


@dataclass(frozen=True, kw_only=True)
class SequenceSplit:
    """How the ranks of a replica share a padded sequence between a layer's parallel regions.

    Attributes:
        cp_size: Context-parallel ranks.
        tp_size: Tensor-parallel ranks that share what a context-parallel rank has: their number
            under sequence parallelism, else 1.
        multiple: A rank's share is a multiple of this many tokens.
    """

    cp_size: int
    tp_size: int
    multiple: int = 1

    @property
    def pad_to_multiple_of(self) -> int:
        """Tokens that a sequence is padded to a multiple of."""
        return self.cp_size * lcm(self.tp_size * self.multiple, 2 if self.cp_size > 1 else 1)

    def largest_share(self, counts: Tensor) -> int:
        """What the rank with most of it has of something that is counted by position.

        Args:
            counts: A number for each position of a sequence, [s] before padding.
        """
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

    Megatron's zigzag: of 2 cp equal chunks the rank-th from either end, so that causal attention
    costs every rank the same.

    Args:
        seq_len: The sequence's length s, a multiple of 2 cp (of nothing for one rank).
        rank: Rank in the context-parallel group.
        size: Size cp of the group.
    """
    positions = torch.arange(seq_len)
    if size == 1:
        return positions
    chunks = positions.chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
