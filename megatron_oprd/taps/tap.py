"""Taps on live models: the teacher's collect targets, the student's attach the loss.

The loss is attached where the hidden state is, on the pipeline stage that owns the layer, through
an autograd function in the layer's forward pass. The schedule knows nothing of it, and no hidden
state leaves its stage.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_oprd.config_losses import Normalize
from megatron_oprd.losses.bridge import Projectors
from megatron_oprd.losses.representation import compare
from megatron_oprd.models.layers import Tap
from megatron_oprd.taps.layer_map import LayerPair
from megatron_oprd.taps.selection import Selection


class _AttachGradient(torch.autograd.Function):
    """Passes a hidden state through unchanged and adds a loss's gradient to the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, index: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(index, gradient)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, gradient = ctx.saved_tensors
        return grad.flatten(0, 1).index_add(0, index, gradient).view_as(grad), None, None


class PairTaps:
    """Taps on this rank's chunks of both models: the teacher's keep rows for the student's to take.

    Args:
        pairs: All matched layers, by rising student layer; each rank taps those it owns.
        post_norm: Whether a model's last layer is taken after the final norm.
        projectors: Of a bridge, of this rank's layers at least: targets are projected where they
            are taken, so that r numbers of each are kept.
    """

    def __init__(
        self, pairs: Sequence[LayerPair], *, post_norm: bool, projectors: Projectors | None = None
    ) -> None:
        self._pairs = list(pairs)
        self._post_norm = post_norm
        self._projectors = projectors
        self._current: Selection | None = None
        self._is_paused = False
        self._users = Counter(pair.teacher for pair in self._pairs)
        # (teacher layer, micro-batch): the target, and how many student layers still want it
        self._targets: dict[tuple[int, int], tuple[Tensor, int]] = {}

    def attach_teacher(self, chunks: Sequence[GPTModel], *, depth: int) -> None:
        """Puts collecting taps on a teacher of ``depth`` layers (before it was cut)."""
        for layer in sorted({pair.teacher for pair in self._pairs}):
            self._attach(chunks, layer, depth, self._collecting_tap(layer))

    def attach_student(self, chunks: Sequence[GPTModel], *, depth: int) -> None:
        """Puts taps on a student of ``depth`` layers."""
        for number, pair in enumerate(self._pairs):
            self._attach(chunks, pair.student, depth, self._student_tap(number, pair))

    def begin(self, selection: Selection) -> None:
        """Says which micro-batch the next forward pass is of."""
        self._current = selection

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Has the student's taps do nothing inside the block: for a pass without a loss."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _student_tap(self, number: int, pair: LayerPair) -> Tap:
        """The tap on the student's layer of the ``number``-th pair."""
        raise NotImplementedError

    def _attach(self, chunks: Sequence[GPTModel], layer: int, depth: int, tap: Tap) -> None:
        for chunk in chunks:
            for module in chunk.decoder.layers:
                if module.layer_number - 1 != layer:
                    continue
                if layer == depth - 1 and self._post_norm:
                    norm = chunk.decoder.final_layernorm
                    norm.register_forward_hook(lambda _module, _inputs, output: tap(output))
                elif module.tap is None:
                    module.tap = tap
                else:
                    module.tap = _one_after_the_other(module.tap, tap)

    def _take_target(self, layer: int, micro_batch: int) -> Tensor:
        """The target, which goes with its last user."""
        target, users = self._targets.pop((layer, micro_batch))
        if users > 1:
            self._targets[layer, micro_batch] = target, users - 1
        return target

    def _collecting_tap(self, layer: int) -> Tap:
        def collect(hidden: Tensor) -> Tensor:
            selection = self._current
            assert selection is not None
            rows = hidden.detach().flatten(0, 1).index_select(0, selection.index)
            if self._projectors is not None:
                rows = self._projectors.project_teacher(layer, rows)
            if selection.exchange is not None:
                rows = selection.exchange.targets(rows)
            self._targets[layer, selection.micro_batch] = rows, self._users[layer]
            return hidden

        return collect


def _one_after_the_other(first: Tap, second: Tap) -> Tap:
    """Two teachers' taps on one layer of the student."""
    return lambda hidden: second(first(hidden))


class Taps(PairTaps):
    """The taps of a training run, and what they hold during a step.

    Args:
        pairs: All matched layers, by rising student layer; each rank taps those it owns.
        normalize: See `token_mse`.
        coefficients: Factor on the loss of each pair as it is attached; metrics are without it.
        post_norm: Whether a model's last layer is taken after the final norm.
        device: Where the metrics live.
        projectors: Of a bridge; losses and cosines are then those of the projected states.
    """

    def __init__(
        self,
        pairs: Sequence[LayerPair],
        *,
        normalize: Normalize,
        coefficients: Sequence[float],
        post_norm: bool,
        device: torch.device,
        projectors: Projectors | None = None,
    ) -> None:
        super().__init__(pairs, post_norm=post_norm, projectors=projectors)
        self._normalize = normalize
        self._coefficients = list(coefficients)
        self._pending: dict[int, deque[Selection]] = {}
        self._loss = torch.zeros(len(pairs), device=device, dtype=torch.float64)
        self._cosine = torch.zeros(len(pairs), device=device, dtype=torch.float64)

    def end_step(self) -> tuple[Tensor, Tensor]:
        """Hands out the metrics and starts them anew.

        Returns:
            This rank's part of each pair's loss (without the coefficient) and of its cosine, both
            weighted over the global batch, [pairs], fp64. Summed over the ranks that hold a part
            they are the global values.
        """
        assert not any(self._pending.values()), "a recomputed layer was not run again"
        assert not self._targets, "a target was not used"
        loss, cosine = self._loss.clone(), self._cosine.clone()
        self._loss.zero_()
        self._cosine.zero_()
        return loss, cosine

    def _student_tap(self, number: int, pair: LayerPair) -> Tap:
        # Under full recompute the layer's forward runs twice: first without grad, then, during
        # the backward pass, with it, when later micro-batches have begun. Backward passes come in
        # the order of the forward passes, so a queue says which micro-batch it is.
        pending = self._pending.setdefault(number, deque())
        projectors, layer = self._projectors, pair.student

        def attach(hidden: Tensor) -> Tensor:
            if self._is_paused:
                return hidden
            assert self._current is not None
            if not torch.is_grad_enabled():
                pending.append(self._current)
                return hidden
            selection = pending.popleft() if pending else self._current
            rows = hidden.detach().flatten(0, 1).index_select(0, selection.index)  # [n, h]
            target = self._take_target(pair.teacher, selection.micro_batch)
            # The gradient is worked out here and kept in the hidden state's dtype; a graph would
            # keep several fp32 copies of the rows until the backward pass.
            with torch.no_grad():
                states = rows if projectors is None else projectors.project_student(layer, rows)
                found = compare(states, target, normalize=self._normalize)
                self._loss[number] += (selection.weights * found.distance).sum()
                self._cosine[number] += (selection.weights * found.cosine).sum()
                factors = selection.weights * self._coefficients[number]
                gradient = found.gradient.mul_(factors[:, None])
                if projectors is not None:
                    gradient = projectors.student_gradient(layer, gradient)
                gradient = gradient.to(hidden.dtype)
            attached = _AttachGradient.apply(hidden, selection.index, gradient)
            # The schedule frees stage outputs and cannot free a view.
            return make_viewless_tensor(attached, requires_grad=True, keep_graph=True)

        return attach
