"""Maps Hugging Face tensors to tensor-parallel Megatron parameters.

A mapping gives, for any tensor-parallel rank, pairs of equal rectangles of a Hugging Face tensor
and of the rank's local parameter. Loading reads the rectangles and export writes them back, so both
directions share one definition, and no process group is needed.

Parameters are named as in Megatron's checkpoints, with the global layer index:
``decoder.layers.<i>.self_attention.linear_qkv.weight``. The norm before a linear layer is
``<linear>.layer_norm_weight`` in every layer spec. In mixture-of-experts layers the norm is
``pre_mlp_layernorm.weight``, the router ``mlp.router.weight``, and the weights of the layer's
expert e are ``mlp.experts.experts.<e>.linear_fc1.weight`` and ``.linear_fc2.weight``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from typing_extensions import override

from megatron_oprd.parallel.layout import ParallelLayout

Index = tuple[slice, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A rectangle shared by a Hugging Face tensor and a rank's local parameter."""

    hf: str | None  # tensor name; None: padding, zero and not exported
    hf_index: Index  # position in the Hugging Face tensor
    local_index: Index  # position in the local parameter


@dataclass(frozen=True, kw_only=True)
class Mapping(ABC):
    """Composition of one Megatron parameter from Hugging Face tensors."""

    megatron: str  # name of the Megatron parameter
    hf: dict[str, Shape]  # full shapes of the Hugging Face tensors
    # For an expert's parameter: the expert's index in the layer, over all expert-parallel ranks.
    # Such a parameter is split over the expert-tensor-parallel group; `tp_rank` and `tp_size` refer
    # to it.
    expert: int | None = None
    num_experts: int | None = None  # the layer's experts, for an expert's parameter

    @abstractmethod
    def pieces(self, tp_rank: int, tp_size: int) -> list[Piece]:
        """The pieces of rank ``tp_rank``; they cover its local parameter exactly."""

    @abstractmethod
    def local_shape(self, tp_size: int) -> Shape:
        """The parameter's shape on each tensor-parallel rank."""

    def expert_rank(self, ep_size: int) -> int | None:
        """The expert-parallel rank that holds the parameter; None if all ranks do.

        Raises `ValueError` if the layer's experts do not divide into ``ep_size`` ranks.
        """
        if self.expert is None:
            return None
        assert self.num_experts is not None
        if self.num_experts % ep_size:
            raise ValueError(
                f"{self.megatron}: {self.num_experts} experts do not divide into {ep_size} ranks"
            )
        return self.expert // (self.num_experts // ep_size)

    def is_held_at(self, place: ParallelLayout) -> bool:
        """Whether a rank at ``place`` holds the parameter, provided that it holds the layer."""
        return self.expert_rank(place.expert_model_parallel_size) in (None, place.ep_rank)

    def split_at(self, place: ParallelLayout) -> tuple[int, int]:
        """(rank, size) at ``place`` in the group that the parameter is split over."""
        if self.expert is None:
            return place.tp_rank, place.tensor_model_parallel_size
        return place.etp_rank, place.expert_tensor_size

    @property
    def is_replicated(self) -> bool:
        """Whether every tensor-parallel rank holds the whole parameter."""
        return False


@dataclass(frozen=True, kw_only=True)
class Copy(Mapping):
    """A tensor replicated on every tensor-parallel rank: norms, router."""

    @override
    def pieces(self, tp_rank: int, tp_size: int) -> list[Piece]:
        ((name, shape),) = self.hf.items()
        whole = tuple(slice(0, n) for n in shape)
        return [Piece(hf=name, hf_index=whole, local_index=whole)]

    @override
    def local_shape(self, tp_size: int) -> Shape:
        (shape,) = self.hf.values()
        return shape

    @property
    @override
    def is_replicated(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class RowSplit(Mapping):
    """A row-parallel linear layer: [out, in] --> [out, in/tp]."""

    @override
    def pieces(self, tp_rank: int, tp_size: int) -> list[Piece]:
        ((name, _),) = self.hf.items()
        rows, columns = self.local_shape(tp_size)
        start = tp_rank * columns
        return [
            Piece(
                hf=name,
                hf_index=(slice(0, rows), slice(start, start + columns)),
                local_index=(slice(0, rows), slice(0, columns)),
            )
        ]

    @override
    def local_shape(self, tp_size: int) -> Shape:
        ((rows, columns),) = self.hf.values()
        return rows, _divide(columns, tp_size, self.megatron)


@dataclass(frozen=True, kw_only=True)
class _Rows(Mapping):
    """A parameter made of rows of Hugging Face tensors and split by rows."""

    @abstractmethod
    def _segments(self, tp_rank: int, tp_size: int) -> list[tuple[str | None, int, int]]:
        """(tensor, first row, number of rows), in the order of the rank's local rows."""

    @property
    def _trailing(self) -> Shape:
        return next(iter(self.hf.values()))[1:]

    @override
    def pieces(self, tp_rank: int, tp_size: int) -> list[Piece]:
        trailing = tuple(slice(0, n) for n in self._trailing)
        pieces, row = [], 0
        for name, start, count in _joined(self._segments(tp_rank, tp_size)):
            pieces.append(
                Piece(
                    hf=name,
                    hf_index=(slice(start, start + count), *trailing),
                    local_index=(slice(row, row + count), *trailing),
                )
            )
            row += count
        return pieces

    def _of_rank(
        self, order: list[tuple[str, int, int]], tp_rank: int, tp_size: int
    ) -> list[tuple[str | None, int, int]]:
        """A rank's share of all rows, in ``order``: equal runs of them."""
        rows = _divide(sum(count for _, _, count in order), tp_size, self.megatron)
        return _run_of_rows(order, tp_rank * rows, (tp_rank + 1) * rows)

    @override
    def local_shape(self, tp_size: int) -> Shape:
        rows = sum(count for _, _, count in self._segments(0, tp_size))
        return (rows, *self._trailing)


@dataclass(frozen=True, kw_only=True)
class ColumnSplit(_Rows):
    """A column-parallel linear layer: [out, in] --> [out/tp, in]; or a number for each head."""

    @override
    def _segments(self, tp_rank: int, tp_size: int) -> list[tuple[str | None, int, int]]:
        ((name, shape),) = self.hf.items()
        count = _divide(shape[0], tp_size, self.megatron)
        return [(name, tp_rank * count, count)]


@dataclass(frozen=True, kw_only=True)
class GatedMLP(_Rows):
    """Gate and up projection in one parameter: each rank holds [its gate rows; its up rows].

    ``hf`` names gate and up projection in this order, or one tensor with all gate rows and then as
    many up rows.
    """

    @override
    def _segments(self, tp_rank: int, tp_size: int) -> list[tuple[str | None, int, int]]:
        rows = sum(shape[0] for shape in self.hf.values()) // 2
        count = _divide(rows, tp_size, self.megatron)
        return [
            (name, first + tp_rank * count, count) for name, first in _parts(self.hf, [rows, rows])
        ]


@dataclass(frozen=True, kw_only=True)
class Vocabulary(_Rows):
    """Embedding or LM head: rows zero-padded to ``padded_vocab_size``, then split."""

    padded_vocab_size: int

    @override
    def _segments(self, tp_rank: int, tp_size: int) -> list[tuple[str | None, int, int]]:
        ((name, shape),) = self.hf.items()
        count = _divide(self.padded_vocab_size, tp_size, self.megatron)
        start = tp_rank * count
        # Padding may begin within a rank, and the last ranks may have padding only.
        real = min(max(shape[0] - start, 0), count)
        segments: list[tuple[str | None, int, int]] = [(name, start, real), (None, 0, count - real)]
        return [segment for segment in segments if segment[2]]


@dataclass(frozen=True, kw_only=True)
class QKV(_Rows):
    """Attention's query, key and value projection (weight or bias) in one parameter.

    Megatron orders rows by query group: query heads, key head, value head of each. Ranks take equal
    runs of rows. With fewer groups than ranks a run ends inside a group, as megatron-core expects.
    ``hf`` names query, key and value in this order, or one tensor with all query, all key and all
    value rows.
    """

    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    # Whether the query tensor has each head's output gate behind its query. Megatron has a group's
    # gates behind its queries.
    has_gate: bool = False

    @override
    def _segments(self, tp_rank: int, tp_size: int) -> list[tuple[str | None, int, int]]:
        groups, dim = self.num_query_groups, self.head_dim
        of_group = [self.num_attention_heads // groups * dim, dim, dim]  # query, key, value rows
        order: list[tuple[str, int, int]] = []
        if self.has_gate:
            query, key, value = self.hf
            heads = self.num_attention_heads // groups
            for group in range(groups):
                # Even runs of head_dim rows are queries, odd ones gates.
                first = 2 * group * heads
                runs = [
                    *range(first, first + 2 * heads, 2),
                    *range(first + 1, first + 2 * heads, 2),
                ]
                order += [(query, run * dim, dim) for run in runs]
                order += [(key, group * dim, dim), (value, group * dim, dim)]
            return self._of_rank(order, tp_rank, tp_size)
        parts = _parts(self.hf, [groups * rows for rows in of_group])
        for group in range(groups):
            for (name, first), rows in zip(parts, of_group, strict=True):
                order.append((name, first + group * rows, rows))
        return self._of_rank(order, tp_rank, tp_size)


@dataclass(frozen=True, kw_only=True)
class GroupedRows(_Rows):
    """Rows of tensors that have parts below one another, ordered by group instead.

    A tensor has all groups' rows of its first part, then of the second, and so on, and the next
    tensor those of the following parts; the parameter has all parts of the first group, then of the
    second. Ranks take whole groups.
    """

    num_groups: int
    rows_of_group: tuple[int, ...]  # of each part

    @override
    def _segments(self, tp_rank: int, tp_size: int) -> list[tuple[str | None, int, int]]:
        groups = _divide(self.num_groups, tp_size, self.megatron)
        parts = _parts(self.hf, [self.num_groups * rows for rows in self.rows_of_group])
        return [
            (name, first + group * rows, rows)
            for group in range(tp_rank * groups, (tp_rank + 1) * groups)
            for (name, first), rows in zip(parts, self.rows_of_group, strict=True)
        ]


def _parts(hf: dict[str, Shape], rows: list[int]) -> list[tuple[str, int]]:
    """(tensor, first row) of each part, of ``rows`` rows: parts fill the tensors in their order."""
    found, counts = [], iter(rows)
    for name, shape in hf.items():
        first = 0
        while first < shape[0]:
            found.append((name, first))
            first += next(counts)
    return found


def _run_of_rows(
    order: list[tuple[str, int, int]], begin: int, end: int
) -> list[tuple[str | None, int, int]]:
    """The segments that cover rows [begin, end) of the concatenation of ``order``."""
    run: list[tuple[str | None, int, int]] = []
    row = 0
    for name, start, count in order:
        first, last = max(begin, row), min(end, row + count)
        if first < last:
            run.append((name, start + first - row, last - first))
        row += count
    return run


def _joined(
    segments: list[tuple[str | None, int, int]],
) -> list[tuple[str | None, int, int]]:
    """The segments with those that follow on one another in one tensor made one: one read each."""
    joined: list[tuple[str | None, int, int]] = []
    for name, start, count in segments:
        if joined and joined[-1][0] == name and sum(joined[-1][1:]) == start:
            joined[-1] = (name, joined[-1][1], joined[-1][2] + count)
        else:
            joined.append((name, start, count))
    return joined


def _divide(size: int, parts: int, parameter: str) -> int:
    if size % parts:
        raise ValueError(f"{parameter}: {size} rows or columns do not divide into {parts} ranks")
    return size // parts
