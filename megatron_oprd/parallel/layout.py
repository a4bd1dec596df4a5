"""The share of a model's parameters, and of a sequence, that a rank holds, as plain numbers.

Needs no process group. `ParallelContext` has the groups of a running job.
"""

from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

from megatron_oprd.config.schema import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """The sizes of the groups that share a model and its sequences, and a rank's place in them.

    The default place is the first. All places hold equally many parameters of their layers.
    """

    # Shares all parameters except the experts'.
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    # Shares out the experts of a layer.
    expert_model_parallel_size: int = 1
    # Shares each expert. None: tensor_model_parallel_size.
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    token_multiple: int = 1  # of a sequence's tokens on each rank
    tp_rank: int = 0
    etp_rank: int = 0
    ep_rank: int = 0

    @classmethod
    def of(cls, parallel: ParallelConfig, *, token_multiple: int = 1) -> "ParallelLayout":
        """The first place of a configured layout."""
        return cls(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            token_multiple=token_multiple,
        )

    @property
    def expert_tensor_size(self) -> int:
        """``expert_tensor_parallel_size``, its default filled in."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def sequence_size(self) -> int:
        """The tensor-parallel ranks that share a sequence between a layer's parallel regions."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1

    @property
    def pad_to_multiple_of(self) -> int:
        """Sequences are padded to a multiple of this many tokens."""
        cp = self.context_parallel_size
        # Zigzag context parallelism needs two equal chunks on each rank.
        return cp * lcm(self.sequence_size * self.token_multiple, 2 if cp > 1 else 1)

    def largest_share(self, counts: Tensor) -> int:
        """The sum of ``counts`` ([s] before padding, by position) on the rank that has most."""
        length = -(-len(counts) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = torch.nn.functional.pad(counts, (0, length - len(counts)))
        shares = [
            int(share.sum())
            for rank in range(self.context_parallel_size)
            for share in padded[
                context_parallel_positions(length, rank=rank, size=self.context_parallel_size)
            ].chunk(self.sequence_size)
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
