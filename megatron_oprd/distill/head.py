"""The output-space loss and token log-probabilities at the LM head, on the last pipeline stage.

The teacher's last hidden states are kept, not its logits. Both models' logits exist for one chunk
of positions at a time: no [b, s, vocabulary] tensor is ever made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_oprd.config.schema import OutputLossConfig
from megatron_oprd.data.batching import MicroBatch
from megatron_oprd.distill.output_space import (
    VocabularyShard,
    gather,
    log_softmax,
    output_space_loss,
)
from megatron_oprd.distill.taps import Exchange
from megatron_oprd.models.logits import LogitForm


class _AttachGradients(torch.autograd.Function):
    """Identity on hidden states; backward adds a loss's gradients of the states and the head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        index: Tensor,
        of_rows: Tensor,
        of_weight: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(index, of_rows, of_weight)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        index, of_rows, of_weight = ctx.saved_tensors
        # The gradients are already scaled by coefficient and weights, so the incoming gradient (of
        # the other losses) is added to, not multiplied.
        of_hidden = grad.flatten(0, 1).index_add(0, index, of_rows).view_as(grad)
        return of_hidden, of_weight, None, None, None


@dataclass(frozen=True, kw_only=True)
class _Positions:
    """The compared positions of a micro-batch."""

    index: Tensor  # [n], int64; rows of the flattened hidden state [s * b, h]
    weights: Tensor  # [n], fp32
    labels: Tensor  # [n], int64; the next tokens

    @classmethod
    def of(cls, micro_batch: MicroBatch) -> "_Positions":
        assert micro_batch.weights is not None
        assert micro_batch.weights.outputs is not None
        # [b, s] --> [s * b]
        weights = micro_batch.weights.outputs.t().flatten()
        # On the CPU, where nonzero() needs no synchronisation with the GPU.
        index = weights.nonzero().squeeze(1)
        device = micro_batch.input.tokens.device
        return cls(
            index=index.to(device),
            weights=weights[index].to(device),
            labels=micro_batch.labels.t().flatten()[index].to(device),
        )


class HeadTap:
    """Compares both models' next-token distributions on the last pipeline stage.

    Only ranks of the last stage call `collect` and `attach`, in any order of micro-batches.
    ``student`` and ``teacher`` are the last stage's chunks.

    Attributes:
        coefficient: Factor on the loss in the gradient, not on the metric; 1 until set.
    """

    def __init__(
        self,
        settings: OutputLossConfig,
        *,
        student: GPTModel,
        teacher: GPTModel,
        vocab_size: int,  # columns of both vocabularies, without padding
        padded_vocab_size: int,  # rows of either head, over all TP ranks
        tp_group: dist.ProcessGroup,  # shards both heads by rows
        cp_group: dist.ProcessGroup,  # shards each sequence
        sequence_parallel: bool,  # hidden states are sharded over tp_group
    ) -> None:
        self._settings = settings
        self.coefficient = 1.0
        self._student_head = head_weight(student)
        self._teacher_head = head_weight(teacher)
        self._student_form = student.logit_form
        self._teacher_form = teacher.logit_form
        self._tp_group = tp_group
        self._cp_group = cp_group if cp_group.size() > 1 else None
        self._sequence_parallel = sequence_parallel
        self._shard = VocabularyShard.of(
            vocab_size=vocab_size, padded_vocab_size=padded_vocab_size, group=tp_group
        )
        self._targets: dict[int, Tensor] = {}
        self._positions: dict[int, _Positions] = {}
        self._loss = torch.zeros((), device=self._student_head.device, dtype=torch.float64)

    def collect(self, hidden: Tensor, micro_batches: Sequence[MicroBatch]) -> None:
        """Keeps the teacher's last hidden states, [s, b, h] or [s/tp, b, h], at the positions.

        ``micro_batches`` are the student's that the teacher has read together. With a teacher whose
        micro-batches are others this communicates on the context-parallel group.
        """
        whole = self._whole(hidden.detach()).flatten(0, 1)
        for micro_batch in micro_batches:
            # Kept for the student's pass: building them copies to the GPU and would make it wait
            # again.
            positions = self._positions[micro_batch.index] = _Positions.of(micro_batch)
            if micro_batch.other_input is None:
                targets = whole.index_select(0, positions.index)
            else:
                pairs = micro_batch.other_input.output_pairs
                assert pairs is not None
                # One slice, the whole sequence: `_whole` has gathered it over the tensor-parallel
                # group, so only context parallelism still splits it.
                index, exchange = Exchange.of(
                    pairs, tp_rank=0, tp_size=1, group=self._cp_group, device=whole.device
                )
                targets = whole.index_select(0, index)
                if exchange is not None:
                    targets = exchange.targets(targets)
            self._targets[micro_batch.index] = targets

    def attach(self, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Returns the student's last hidden states with the loss attached.

        ``hidden`` is after the final norm, [s, b, h], or [s/tp, b, h] under sequence parallelism;
        the result is [s, b, h] in both cases.
        """
        whole = self._whole(hidden)
        positions = self._positions.pop(micro_batch.index)
        rows = whole.detach().flatten(0, 1).index_select(0, positions.index)
        with torch.no_grad():
            of_rows, of_weight = self._gradients(
                rows, self._targets.pop(micro_batch.index), positions
            )
        return _AttachGradients.apply(
            whole, self._student_head, positions.index, of_rows, of_weight
        )

    @property
    def targets(self) -> list[Tensor]:
        """The targets of micro-batches that the student has still to run."""
        return list(self._targets.values())

    def end_step(self) -> Tensor:
        """Returns the step's loss, without its coefficient, and resets it.

        The result is this rank's part, weighted over the global batch, fp64, and the same on every
        rank of the tensor-parallel group.
        """
        assert not self._targets, "a target was not used"
        loss = self._loss.clone()
        self._loss.zero_()
        return loss

    def _whole(self, hidden: Tensor) -> Tensor:
        """Hidden states of all positions, [s, b, h]; gradients are summed over the TP group."""
        if self._sequence_parallel:
            # Each rank's gradient covers its own vocabulary columns only, so backward has to
            # reduce-scatter (or, below, all-reduce) instead of taking a slice.
            return gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self._tp_group
            )
        return copy_to_tensor_model_parallel_region(hidden, group=self._tp_group)

    def _gradients(
        self, rows: Tensor, targets: Tensor, positions: _Positions
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the rows [n, h] (by this rank's logits) and of the head."""
        size = self._shard.size
        student, teacher = self._student_head[:size], self._teacher_head[:size]
        of_rows = torch.empty_like(rows)
        # Summed in fp32: a sum over many chunks in bf16 would round small terms away.
        of_weight = torch.zeros_like(self._student_head, dtype=_at_least_fp32(rows.dtype))
        for chunk in torch.arange(len(rows), device=rows.device).split(self._settings.chunk_tokens):
            weights = positions.weights[chunk]
            logits = self._student_form.logits(rows[chunk] @ student.t())
            distance = output_space_loss(
                logits,
                self._teacher_form.logits(targets[chunk] @ teacher.t()),
                positions.labels[chunk],
                self._shard,
                self._settings,
            )
            self._loss += (weights * distance.value).sum()
            scaled = (weights * self.coefficient)[:, None] * distance.gradient
            of_output = self._student_form.gradient_of_output(scaled, logits).to(rows.dtype)
            of_rows[chunk] = of_output @ student
            # Rows past `size` are vocabulary padding; their gradient stays 0.
            of_weight[:size] += of_output.t() @ rows[chunk]
        return of_rows, of_weight.to(self._student_head.dtype)


def head_weight(model: GPTModel) -> Tensor:
    """The last stage's head, [padded_vocab_size/tp, h]; the embedding if the weights are tied."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# Bounds memory: the fp32 logits of a chunk are 512 * 152k / tp * 4 B, 0.3 GB / tp for Qwen3.
CHUNK_TOKENS = 512


class ResponseLogprobs:
    """Log-probabilities of the step's response tokens under a model's own logits.

    The vocabulary stays sharded over the tensor-parallel ranks. Logits exist for ``CHUNK_TOKENS``
    positions at a time. Only ranks of the last stage call `collect`.
    """

    def __init__(
        self,
        head: Tensor | None,  # [padded_vocab_size/tp, h]; None on other stages
        *,
        shard: VocabularyShard,
        is_meaningless: Tensor,  # [v], bool; columns left out of the distribution
        num_tokens: int,  # of the whole step
        sequence_parallel: bool,  # hidden states are sharded over shard.group
        logit_form: LogitForm,  # makes logits of the head's output
    ) -> None:
        self._head = head
        self._logit_form = logit_form
        self._shard = shard
        self._is_meaningless = is_meaningless
        self._sequence_parallel = sequence_parallel
        self._found = torch.zeros(num_tokens, device=is_meaningless.device)

    def collect(self, hidden: Tensor, micro_batch: MicroBatch) -> None:
        """Adds the log-probabilities of a micro-batch. Communicates on the shard's group.

        ``hidden`` is after the final norm, [s, b, h], or [s/tp, b, h] under sequence parallelism.
        ``micro_batch.numbers`` are the response tokens', in the step.
        """
        assert micro_batch.numbers is not None
        assert self._head is not None
        if self._sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self._shard.group)
        # [b, s] --> [s * b]
        # A token's number in the step, from 1; 0 marks positions that predict no response token.
        numbers = micro_batch.numbers.t().flatten()
        index = numbers.nonzero().squeeze(1)
        labels = micro_batch.labels.t().flatten()[index].to(hidden.device)
        numbers, index = (numbers[index] - 1).to(hidden.device), index.to(hidden.device)
        rows, head = hidden.flatten(0, 1), self._head[: self._shard.size]
        for chunk in torch.arange(len(index), device=index.device).split(CHUNK_TOKENS):
            logits = self._logit_form.logits(rows[index[chunk]] @ head.t()).float()
            logits.masked_fill_(self._is_meaningless, -torch.inf)
            logprobs = gather(log_softmax(logits, self._shard), labels[chunk, None], self._shard)
            self._found[numbers[chunk]] = logprobs.squeeze(1)

    def all(self) -> Tensor:
        """The log-probabilities of the step, [num_tokens], fp32. All ranks have to call."""
        if self._shard.group.rank() != 0:
            self._found.zero_()  # these ranks have what tensor rank 0 has
        # Each token was collected by a single data- and context-parallel rank; the others have 0.
        dist.all_reduce(self._found)
        return self._found
