"""Taps on live models: the teacher's collect targets, the student's attach the loss.

The loss is attached where the hidden state is, on the pipeline stage that owns the layer, by an
autograd function in the layer's forward pass. The schedule is not changed, and no hidden state
leaves its stage.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_oprd.config.schema import Normalize
from megatron_oprd.data.batching import MicroBatch, ModelInput, Pairs
from megatron_oprd.distill.layer_map import LayerPair
from megatron_oprd.distill.projectors import Projectors
from megatron_oprd.distill.representation import compare
from megatron_oprd.distill.trainable_projectors import Projector
from megatron_oprd.models.layers import Tap
from megatron_oprd.parallel.context import ParallelContext


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Moves a teacher's rows to the student's positions if they can be on different ranks.

    A pair is a student position and its teacher position. They are on different ranks where ranks
    share sequences and the two models' micro-batches differ, as each is sharded by its own length.
    """

    slots: Tensor  # [m], int64; the pair, from 0, of each teacher row on this rank
    wanted: Tensor  # [n], int64; the pairs that this rank compares, by position
    num_pairs: int  # of the micro-batch, over all ranks of the group
    group: dist.ProcessGroup  # the ranks that share sequences

    @classmethod
    def of(
        cls,
        pairs: Pairs,
        *,
        tp_rank: int,
        tp_size: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> "tuple[Tensor, Exchange | None]":
        """The indices of the teacher's rows that this rank contributes, and the exchange.

        Without a ``group``, each rank having whole sequences, the rows are in the order of the
        student's, and there is nothing to exchange. The other arguments are as in `RankSelector`.
        """
        wanted = slice_of_sequence(pairs.student, tp_rank, tp_size)
        wanted = wanted[wanted > 0] - 1 - pairs.first
        ids = slice_of_sequence(pairs.teacher, tp_rank, tp_size) - 1 - pairs.first
        # Others belong to other micro-batches of the student that the teacher reads along.
        index = ((ids >= 0) & (ids < pairs.count)).nonzero().squeeze(1)
        slots = ids[index]
        if group is None:
            return index[slots.argsort()][wanted].to(device), None
        return index.to(device), cls(
            slots=slots.to(device),
            wanted=wanted.to(device),
            num_pairs=pairs.count,
            group=group,
        )

    def targets(self, rows: Tensor) -> Tensor:
        """The teacher rows that this rank compares with: [m, width] --> [n, width].

        All ranks of the group have to call. All pairs are communicated, so project rows before.
        """
        # Each pair's row is on exactly one rank and 0 on the others, so a sum gathers them. A rank
        # without rows still has to join.
        pairs = rows.new_zeros(self.num_pairs, rows.shape[1]).index_copy(0, self.slots, rows)
        dist.all_reduce(pairs, group=self.group)
        return pairs.index_select(0, self.wanted)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The compared positions of a micro-batch on this rank's slice of the sequence."""

    micro_batch: int  # its number in the step
    index: Tensor  # [n], int64; rows of the flattened hidden state [s * b, h] or [s/tp * b, h]
    weights: Tensor | None = None  # [n], fp32; None without a loss, and on the teacher's side
    numbers: Tensor | None = None  # [n], int64; in passes without a loss, see `MicroBatch`
    exchange: Exchange | None = None  # on the teacher's side, if its micro-batches are others

    @classmethod
    def of(cls, micro_batch: MicroBatch, *, tp_rank: int, tp_size: int) -> "Selection":
        """Selects on one of ``tp_size`` equal slices of the sequence (1: the whole of it).

        These are the supervised positions or, in a pass without a loss, the numbered ones.
        """
        weights, numbers = micro_batch.weights, micro_batch.numbers
        chosen = numbers if weights is None else weights.states
        assert chosen is not None
        # On the CPU, where nonzero() needs no synchronisation with the GPU.
        values = slice_of_sequence(chosen, tp_rank, tp_size)
        index = values.nonzero().squeeze(1)
        device = micro_batch.input.tokens.device
        values = values[index].to(device)
        return cls(
            micro_batch=micro_batch.index,
            index=index.to(device),
            weights=None if weights is None else values,
            numbers=values if weights is None else None,
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
        """Selects the teacher's rows at the compared positions, if its micro-batches are others.

        ``group`` is as in `RankSelector`.
        """
        assert micro_batch.other_input is not None
        index, exchange = Exchange.of(
            micro_batch.other_input.pairs,
            tp_rank=tp_rank,
            tp_size=tp_size,
            group=group,
            device=micro_batch.input.tokens.device,
        )
        return cls(micro_batch=micro_batch.index, index=index, exchange=exchange)


@dataclass(frozen=True, kw_only=True)
class RankSelector:
    """Selects on this rank's slice of each sequence."""

    tp_rank: int  # the slice, from 0
    tp_size: int  # the number of slices; 1 without sequence parallelism
    # The ranks that share sequences; None if each has whole sequences.
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, context: ParallelContext, *, sequence_parallel: bool) -> "RankSelector":
        """The selector of this rank."""
        groups = context.groups
        # Without sequence parallelism the tensor-parallel ranks hold the same rows: summing over
        # them would count each row tp times.
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

    def select(self, micro_batch: MicroBatch, *, for_teacher: bool) -> tuple[ModelInput, Selection]:
        """What a model reads, and its compared positions."""
        slice_ = {"tp_rank": self.tp_rank, "tp_size": self.tp_size}
        if for_teacher and micro_batch.other_input is not None:
            selection = Selection.of_teacher(micro_batch, **slice_, group=self.group)
            return micro_batch.teacher_input, selection
        return micro_batch.input, Selection.of(micro_batch, **slice_)


def slice_of_sequence(values: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """One of the equal slices of the sequence, in a hidden state's order: [b, s] --> [s/tp * b]."""
    return values.t().chunk(tp_size)[tp_rank].flatten()


class _AttachGradient(torch.autograd.Function):
    """Identity on a hidden state; backward adds a loss's gradient to the incoming one."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, index: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(index, gradient)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, gradient = ctx.saved_tensors
        return grad.flatten(0, 1).index_add(0, index, gradient).view_as(grad), None, None


class _AttachToProjected(torch.autograd.Function):
    """Identity on a hidden state; backward also starts a loss's gradient at projected states.

    From there autograd takes it through the projector, to its parameters and to the hidden state.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, projected: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad, gradient, None


class PairTaps:
    """Taps on this rank's chunks of both models: the teacher's keep rows that the student's take.

    Each rank taps the layers of ``pairs`` (by rising student layer) that it owns. With
    ``post_norm`` a model's last layer is tapped after the final norm. ``projectors`` are a
    bridge's, at least for this rank's layers.
    """

    def __init__(
        self, pairs: Sequence[LayerPair], *, post_norm: bool, projectors: Projectors | None = None
    ) -> None:
        self._pairs = list(pairs)
        self._post_norm = post_norm
        self._projectors = projectors
        self._current: tuple[Selection, ...] = ()
        self._is_paused = False
        self._users = Counter(pair.teacher for pair in self._pairs)
        # (teacher layer, micro-batch): the target, and the number of student layers still to read
        # it
        self._targets: dict[tuple[int, int], tuple[Tensor, int]] = {}

    def attach_teacher(self, chunks: Sequence[GPTModel], *, depth: int) -> None:
        """Puts collecting taps on the teacher; ``depth`` is its number of layers before cutting."""
        for layer in sorted({pair.teacher for pair in self._pairs}):
            self._attach(chunks, layer, depth, self._collecting_tap(layer))

    def attach_student(self, chunks: Sequence[GPTModel], *, depth: int) -> None:
        """Puts taps on a student of ``depth`` layers."""
        for number, pair in enumerate(self._pairs):
            self._attach(chunks, pair.student, depth, self._student_tap(number, pair))

    def begin(self, *selections: Selection) -> None:
        """Announces the next forward pass: the student's micro-batch, or those that it consists of.

        Only a teacher's has several.
        """
        self._current = selections

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Turns the student's taps off inside the block, for forward passes without a loss."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @property
    def _of_student(self) -> Selection:
        """The student's micro-batch that is running."""
        (selection,) = self._current
        return selection

    def _student_tap(self, number: int, pair: LayerPair) -> Tap:
        """The tap on the student's layer of the ``number``-th pair."""
        raise NotImplementedError

    def _attach(self, chunks: Sequence[GPTModel], layer: int, depth: int, tap: Tap) -> None:
        for chunk in chunks:
            for module in chunk.decoder.layers:
                if module.layer_number - 1 != layer:  # Megatron counts layers from 1
                    continue
                if layer == depth - 1 and self._post_norm:
                    norm = chunk.decoder.final_layernorm
                    norm.register_forward_hook(lambda _module, _inputs, output: tap(output))
                elif module.tap is None:
                    module.tap = tap
                else:
                    # With several teachers, the taps of each are on the same student layer.
                    module.tap = _one_after_the_other(module.tap, tap)

    def _take_target(self, layer: int, micro_batch: int) -> Tensor:
        """The target; frees it after its last use."""
        target, users = self._targets.pop((layer, micro_batch))
        if users > 1:
            self._targets[layer, micro_batch] = target, users - 1
        return target

    def _collecting_tap(self, layer: int) -> Tap:
        def collect(hidden: Tensor) -> Tensor:
            assert self._current
            states = hidden.detach().flatten(0, 1)
            # One by one, so that each target is a tensor of its own, freed after its last use.
            for selection in self._current:
                rows = states.index_select(0, selection.index)
                # Projected here, so that r numbers of each row are kept and exchanged, not d_T.
                if self._projectors is not None:
                    rows = self._projectors.project_teacher(layer, rows)
                if selection.exchange is not None:
                    rows = selection.exchange.targets(rows)
                self._targets[layer, selection.micro_batch] = rows, self._users[layer]
            return hidden

        return collect


def _one_after_the_other(first: Tap, second: Tap) -> Tap:
    return lambda hidden: second(first(hidden))


class Taps(PairTaps):
    """The taps of a training run, with the loss and cosine sums of a step.

    With ``projectors`` losses and cosines are of the projected states. Other arguments as in
    `PairTaps`.

    Attributes:
        coefficients: Factor on each pair's loss in the gradient, not on the metrics; 1 until set.
        trainable: Projectors that train, by student layer; none until set.
    """

    def __init__(
        self,
        pairs: Sequence[LayerPair],
        *,
        normalize: Normalize,
        post_norm: bool,
        device: torch.device,  # of the metrics
        projectors: Projectors | None = None,
        compiles: bool = False,  # the comparison, into one kernel
    ) -> None:
        super().__init__(pairs, post_norm=post_norm, projectors=projectors)
        self._normalize = normalize
        # Numbers of rows differ by micro-batch, so the kernel must not be made for one of them.
        self._compare = torch.compile(compare, dynamic=True) if compiles else compare
        self.coefficients = [1.0] * len(pairs)
        self.trainable: Mapping[int, Projector] = {}
        self._pending: dict[int, deque[Selection]] = {}
        self._loss = torch.zeros(len(pairs), device=device, dtype=torch.float64)
        self._cosine = torch.zeros(len(pairs), device=device, dtype=torch.float64)

    @property
    def targets(self) -> list[Tensor]:
        """The targets that student layers have still to read."""
        return [target for target, _ in self._targets.values()]

    def end_step(self) -> tuple[Tensor, Tensor]:
        """Returns the loss and cosine of each pair, [pairs], fp64, and resets them.

        They are this rank's part, weighted over the global batch, without the coefficients. Their
        sums over the ranks that hold a part are the global values.
        """
        assert not any(self._pending.values()), "a recomputed layer was not run again"
        assert not self._targets, "a target was not used"
        loss, cosine = self._loss.clone(), self._cosine.clone()
        self._loss.zero_()
        self._cosine.zero_()
        return loss, cosine

    def _student_tap(self, number: int, pair: LayerPair) -> Tap:
        # Under full recompute the layer's forward runs twice: first without grad, then with grad
        # during the backward pass, when later micro-batches may already have begun. Backward passes
        # come in the order of the forward passes, so a queue tells which micro-batch it is.
        pending = self._pending.setdefault(number, deque())
        projectors, layer = self._projectors, pair.student

        def attach(hidden: Tensor) -> Tensor:
            if self._is_paused:
                return hidden
            if not torch.is_grad_enabled():
                pending.append(self._of_student)
                return hidden
            selection = pending.popleft() if pending else self._of_student
            target = self._take_target(pair.teacher, selection.micro_batch)
            if layer in self.trainable:
                rows = hidden.flatten(0, 1).index_select(0, selection.index)  # [n, h]
                states = self.trainable[layer](rows)
                gradient = self._measure(number, selection, states.detach(), target)
                attached = _AttachToProjected.apply(hidden, states, gradient)
            else:
                # The gradient is computed now and kept in the hidden state's dtype; an autograd
                # graph would keep several fp32 copies of the rows until the backward pass.
                rows = hidden.detach().flatten(0, 1).index_select(0, selection.index)  # [n, h]
                states = rows if projectors is None else projectors.project_student(layer, rows)
                gradient = self._measure(number, selection, states, target)
                if projectors is not None:
                    gradient = projectors.student_gradient(layer, gradient)
                gradient = gradient.to(hidden.dtype)
                attached = _AttachGradient.apply(hidden, selection.index, gradient)
            # The pipeline schedule deallocates stage outputs and cannot deallocate a view.
            return make_viewless_tensor(attached, requires_grad=True, keep_graph=True)

        return attach

    @torch.no_grad()
    def _measure(self, number: int, selection: Selection, states: Tensor, target: Tensor) -> Tensor:
        """Adds to the metrics of the ``number``-th pair; returns the gradient of its loss.

        ``states`` and ``target`` are [n, width], and so is the gradient, with respect to
        ``states``, in fp32 at least.
        """
        weights = selection.weights
        assert weights is not None
        found = self._compare(states, target, normalize=self._normalize)
        self._loss[number] += (weights * found.distance).sum()
        self._cosine[number] += (weights * found.cosine).sum()
        factors = weights * self.coefficients[number]
        return found.gradient.mul_(factors[:, None])
