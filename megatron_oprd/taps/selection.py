"""Which rows of a hidden state are compared, on this rank's slice of the sequence."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.data.batching import MicroBatch
from megatron_oprd.parallel import ParallelContext


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """How the rows of a teacher that reads other sequences come to the student's positions.

    Attributes:
        slots: The pair that each of this rank's rows is of, from 0, [m], int64.
        wanted: The pairs that this rank compares, in the order of its positions, [n], int64.
        num_pairs: Pairs of the micro-batch, over all ranks that share its sequences.
        group: These ranks; None if each has whole sequences.
    """

    slots: Tensor
    wanted: Tensor
    num_pairs: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(
        cls,
        *,
        wanted: Tensor,
        ids: Tensor,
        count: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> "tuple[Tensor, Exchange]":
        """The exchange, and the teacher's rows that this rank gives to it.

        Args:
            wanted: The pair of each of the student's rows here, from 1; 0 is none.
            ids: That of each of the teacher's rows here.
            count: Pairs of the micro-batch.
            group: The ranks that share its sequences; None if each has whole ones.
            device: Where the tensors go.
        """
        index = ids.nonzero().squeeze(1)
        return index.to(device), cls(
            slots=(ids[index] - 1).to(device),
            wanted=(wanted[wanted > 0] - 1).to(device),
            num_pairs=count,
            group=group,
        )

    def targets(self, rows: Tensor) -> Tensor:
        """The rows of all ranks that this rank compares with: [m, width] --> [n, width].

        All pairs go over the group, so rows should be projected before.
        """
        pairs = rows.new_zeros(self.num_pairs, rows.shape[1]).index_copy(0, self.slots, rows)
        if self.group is not None:
            dist.all_reduce(pairs, group=self.group)
        return pairs.index_select(0, self.wanted)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The compared positions of a micro-batch on this rank's slice of the sequence.

    Attributes:
        micro_batch: The micro-batch's number.
        index: Rows of the flattened hidden state [s * b, h] (or [s/tp * b, h]), [n], int64.
        weights: What each counts for in the loss, [n], fp32; not used on the teacher's side.
        exchange: Set on the side of a teacher that reads other sequences.
    """

    micro_batch: int
    index: Tensor
    weights: Tensor
    exchange: Exchange | None = None

    @classmethod
    def of(cls, micro_batch: MicroBatch, *, tp_rank: int, tp_size: int) -> "Selection":
        """Selects on one of ``tp_size`` equal slices of the sequence (1: the whole of it)."""
        weights = slice_of_sequence(micro_batch.weights, tp_rank, tp_size)
        index = weights.nonzero().squeeze(1)
        device = micro_batch.tokens.device
        return cls(
            micro_batch=micro_batch.index,
            index=index.to(device),
            weights=weights[index].to(device),
        )

    @classmethod
    def of_teacher(
        cls,
        micro_batch: MicroBatch,
        *,
        tp_rank: int,
        tp_size: int,
        group: dist.ProcessGroup | None,
    ) -> "Selection":
        """Selects what a teacher that reads other sequences has at the compared positions.

        Args:
            micro_batch: The student's, with the teacher's.
            tp_rank: See `of`.
            tp_size: See `of`.
            group: The ranks that share sequences; None if each has whole ones.
        """
        assert micro_batch.teacher is not None
        student, teacher = micro_batch.pairs, micro_batch.teacher.pairs
        assert student is not None
        assert teacher is not None
        index, exchange = Exchange.of(
            wanted=slice_of_sequence(student.ids, tp_rank, tp_size),
            ids=slice_of_sequence(teacher.ids, tp_rank, tp_size),
            count=student.count,
            group=group,
            device=micro_batch.tokens.device,
        )
        return cls(
            micro_batch=micro_batch.index,
            index=index,
            weights=torch.empty(0, device=index.device),
            exchange=exchange,
        )


@dataclass(frozen=True, kw_only=True)
class RankSelector:
    """Selects on a rank's slice of each sequence.

    Attributes:
        tp_rank: The slice among those of the tensor-parallel ranks, from 0.
        tp_size: Such slices: the tensor-parallel size under sequence parallelism, else 1.
        group: The ranks that share sequences; None if each has whole ones.
    """

    tp_rank: int
    tp_size: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, context: ParallelContext, *, sequence_parallel: bool) -> "RankSelector":
        """That of a rank."""
        groups = context.groups
        sharing = {
            (False, False): None,
            (True, False): groups.tp,
            (False, True): groups.cp,
            (True, True): groups.tp_cp,
        }
        return cls(
            tp_rank=context.tp_rank if sequence_parallel else 0,
            tp_size=context.tp_size if sequence_parallel else 1,
            group=sharing[sequence_parallel, context.cp_size > 1],
        )

    def select(self, micro_batch: MicroBatch, *, for_teacher: bool) -> tuple[MicroBatch, Selection]:
        """What a model reads of a micro-batch, and what of it is compared."""
        slice_ = {"tp_rank": self.tp_rank, "tp_size": self.tp_size}
        if for_teacher and micro_batch.teacher is not None:
            selection = Selection.of_teacher(micro_batch, **slice_, group=self.group)
            return micro_batch.teacher, selection
        return micro_batch, Selection.of(micro_batch, **slice_)


def slice_of_sequence(values: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """One of equal slices of the sequence, in a hidden state's order: [b, s] --> [s/tp * b]."""
    return values.t().chunk(tp_size)[tp_rank].flatten()
