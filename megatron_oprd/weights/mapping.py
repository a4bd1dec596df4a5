"""Mapping kinds between Hugging Face tensors and tensor-parallel Megatron parameters.

A mapping says, for any tensor-parallel rank, which rectangle of which Hugging Face tensor is
which rectangle of the rank's local parameter. Loading reads the rectangles, export writes them
back, so both directions are one definition and no process group is needed to know a rank's share.

Megatron parameters carry the names of Megatron's own checkpoints with the global layer index,
``decoder.layers.<i>.self_attention.linear_qkv.weight``; a norm in front of a linear layer is
``<linear>.layer_norm_weight`` whichever layer spec the model was built with. In layers with a
mixture of experts the norm in front of it is ``pre_mlp_layernorm.weight``, the router
``mlp.router.weight``, and expert e of all the layer's experts
``mlp.experts.experts.<e>.linear_fc1.weight`` and ``.linear_fc2.weight``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from typing_extensions import override

from megatron_oprd.parallel.layout import Place

Index = tuple[slice, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One rectangle that a Hugging Face tensor and a rank's local parameter have in common.

    Attributes:
        hf: Name of the Hugging Face tensor; None marks padding, which is zero and not exported.
        hf_index: The rectangle in the Hugging Face tensor.
        local_index: The same rectangle in the local parameter.
    """

    hf: str | None
    hf_index: Index
    local_index: Index


@dataclass(frozen=True, kw_only=True)
class Mapping(ABC):
    """How one Megatron parameter is made of Hugging Face tensors.

    Attributes:
        megatron: Name of the Megatron parameter.
        hf: Full shapes of the Hugging Face tensors, by name.
        expert: For an expert's parameter: which of the layer's experts, counted over all
            expert-parallel ranks. The parameter is then split over the expert-tensor-parallel
            group, and that is the group that `pieces` and `local_shape` mean. None for all others.
        num_experts: For an expert's parameter: how many experts the layer has.
    """

    megatron: str
    hf: dict[str, Shape]
    expert: int | None = None
    num_experts: int | None = None

    @abstractmethod
    def pieces(self, tp_rank: int, tp_size: int) -> list[Piece]:
        """The pieces of tensor-parallel rank ``tp_rank``; they cover its parameter exactly."""

    @abstractmethod
    def local_shape(self, tp_size: int) -> Shape:
        """Shape of the parameter on each tensor-parallel rank."""

    def expert_rank(self, ep_size: int) -> int | None:
        """The one of ``ep_size`` expert-parallel ranks that has the parameter; None: all have it.

        Raises:
            ValueError: The layer's experts do not divide into ``ep_size`` ranks.
        """
        if self.expert is None:
            return None
        assert self.num_experts is not None
        if self.num_experts % ep_size:
            raise ValueError(
                f"{self.megatron}: {self.num_experts} experts do not divide into {ep_size} ranks"
            )
        return self.expert // (self.num_experts // ep_size)

    def is_held_at(self, place: Place) -> bool:
        """Whether a rank at ``place`` has the parameter, if it has the layer."""
        return self.expert_rank(place.ep_size) in (None, place.ep_rank)

    def split_at(self, place: Place) -> tuple[int, int]:
        """Rank and size, at ``place``, of the group that the parameter is split over."""
        if self.expert is None:
            return place.tp_rank, place.tp_size
        return place.etp_rank, place.etp_size

    @property
    def is_replicated(self) -> bool:
        """Whether every tensor-parallel rank holds the whole parameter."""
        return False


@dataclass(frozen=True, kw_only=True)
class Copy(Mapping):
    """The same tensor on every tensor-parallel rank: norms."""

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
    """A parameter whose rows are rows of Hugging Face tensors, split over ranks by rows."""

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
        for name, start, count in self._segments(tp_rank, tp_size):
            pieces.append(
                Piece(
                    hf=name,
                    hf_index=(slice(start, start + count), *trailing),
                    local_index=(slice(row, row + count), *trailing),
                )
            )
            row += count
        return pieces

    @override
    def local_shape(self, tp_size: int) -> Shape:
        rows = sum(count for _, _, count in self._segments(0, tp_size))
        return (rows, *self._trailing)


@dataclass(frozen=True, kw_only=True)
class GatedMLP(_Rows):
    """Gate and up projection in one parameter: each rank holds [its gate rows; its up rows].

    ``hf`` names the gate projection first, then the up projection; or one tensor that holds the
    gate's rows and then as many of the up projection.
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
    """Embedding or LM head, its rows padded with zeros to ``padded_vocab_size`` and then split."""

    padded_vocab_size: int

    @override
    def _segments(self, tp_rank: int, tp_size: int) -> list[tuple[str | None, int, int]]:
        ((name, shape),) = self.hf.items()
        count = _divide(self.padded_vocab_size, tp_size, self.megatron)
        start = tp_rank * count
        real = min(max(shape[0] - start, 0), count)
        segments: list[tuple[str | None, int, int]] = [(name, start, real), (None, 0, count - real)]
        return [segment for segment in segments if segment[2]]


@dataclass(frozen=True, kw_only=True)
class QKV(_Rows):
    """Attention's query, key and value projection (weight or bias) in one parameter.

    Megatron orders rows by key/value group: the group's query heads, its key head, its value
    head. Ranks take equal runs of these rows; with fewer groups than ranks a run ends inside a
    group, as megatron-core expects. ``hf`` names query, key, value in this order; or one tensor
    that holds all query rows, then all key rows, then all value rows.
    """

    num_attention_heads: int
    num_query_groups: int
    head_dim: int

    @override
    def _segments(self, tp_rank: int, tp_size: int) -> list[tuple[str | None, int, int]]:
        groups, dim = self.num_query_groups, self.head_dim
        of_group = [self.num_attention_heads // groups * dim, dim, dim]
        parts = _parts(self.hf, [groups * rows for rows in of_group])
        order: list[tuple[str, int, int]] = []
        for group in range(groups):
            for (name, first), rows in zip(parts, of_group, strict=True):
                order.append((name, first + group * rows, rows))
        total = sum(count for _, _, count in order)
        rows = _divide(total, tp_size, self.megatron)
        return _run_of_rows(order, tp_rank * rows, (tp_rank + 1) * rows)


def _parts(hf: dict[str, Shape], rows: list[int]) -> list[tuple[str, int]]:
    """(tensor, first row) of each part: a tensor each, or all of them in one, ``rows`` long."""
    if len(hf) > 1:
        return [(name, 0) for name in hf]
    (name,) = hf
    return [(name, sum(rows[:part])) for part in range(len(rows))]


def _run_of_rows(
    order: list[tuple[str, int, int]], begin: int, end: int
) -> list[tuple[str | None, int, int]]:
    """The part of ``order`` that covers rows [begin, end) of its concatenation."""
    run: list[tuple[str | None, int, int]] = []
    row = 0
    for name, start, count in order:
        first, last = max(begin, row), min(end, row + count)
        if first < last:
            run.append((name, start + first - row, last - first))
        row += count
    return run


def _divide(size: int, parts: int, parameter: str) -> int:
    if size % parts:
        raise ValueError(f"{parameter}: {size} rows or columns do not divide into {parts} ranks")
    return size // parts
