"""Runs model chunks over micro-batches under Megatron's schedule."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_oprd.data.batching import MicroBatch, ModelInput, TeacherBatch
from megatron_oprd.models.layers import HostPackedSeqParams

Batch = TypeVar("Batch", MicroBatch, TeacherBatch)


def run_schedule(
    chunks: Sequence[Any],
    micro_batches: Sequence[Batch],
    *,
    forward_only: bool,
    begin: Callable[[Batch], ModelInput],
    end: Callable[[Tensor, Batch, Any], Tensor] = lambda hidden, micro_batch, chunk: hidden,
) -> None:
    """Runs a model over micro-batches, forward only or with the backward pass.

    Args:
        chunks: This rank's chunks.
        micro_batches: The micro-batches of this run.
        forward_only: Runs no backward pass.
        begin: Called before each forward pass of a chunk; returns what the model reads.
        end: Called after it with output, micro-batch and chunk; returns the output to pass on.
    """

    def forward_step(data: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
        micro_batch = next(data)
        read = begin(micro_batch)
        hidden = chunk(
            read.tokens, read.position_ids, None, packed_seq_params=packed_seq_params(read)
        )
        # Losses are attached at their layers, so the schedule's own loss is zero.
        return end(hidden, micro_batch, chunk), _no_loss_at_the_end

    get_forward_backward_func()(
        forward_step_func=forward_step,
        # Every chunk of a virtual pipeline reads all micro-batches.
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        # Unused: with a pipeline, lengths are variable; without, nothing is sent.
        seq_length=micro_batches[0].input.tokens.shape[1],
        micro_batch_size=micro_batches[0].input.tokens.shape[0],
        forward_only=forward_only,
    )


def packed_seq_params(read: ModelInput) -> HostPackedSeqParams | None:
    """Returns the metadata of packed sequences for attention and rotary embedding.

    None if the sequences are padded.
    """
    lengths = read.packed_lengths
    if lengths is None:
        return None
    ends = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    ends = ends.to(read.tokens.device)
    return HostPackedSeqParams(
        lengths=lengths,
        positions=read.position_ids[0],
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def _no_loss_at_the_end(hidden: Tensor) -> tuple[Tensor, dict]:
    return hidden.flatten()[0].float() * 0.0, {}
