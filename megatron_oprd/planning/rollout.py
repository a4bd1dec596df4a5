"""What the embedded rollout engine (transformers' ``generate``) takes on a replica's leader."""

import math
from dataclasses import dataclass

from megatron_oprd.planning.workload import Workload
from megatron_oprd.training.layout import RunLayout

_FP32, _FP64 = 4, 8


def generation_batch(layout: RunLayout, workload: Workload) -> int:
    """Responses that are generated at once."""
    limit = layout.config.rollout.max_batch_size
    return min(limit or workload.num_sequences, workload.num_sequences)


@dataclass(frozen=True, kw_only=True)
class EngineBytes:
    """The engine's memory.

    Attributes:
        weights: Its copy of the student, whole, which stays between rollouts.
        kv_cache: Keys and values at the end of the longest generation.
        workspace: What the prompts' forward pass, a layer's attention, or sampling needs beside
            that.
        sync_workspace: What the largest tensor needs while it is gathered for the engine.
    """

    weights: int
    kv_cache: int
    workspace: int
    sync_workspace: int


def engine_bytes(layout: RunLayout, workload: Workload, *, itemsize: int) -> EngineBytes:
    """The engine's memory.

    Args:
        layout: The run.
        workload: The step.
        itemsize: Bytes of a weight.
    """
    a = layout.student.architecture
    batch, prompt = generation_batch(layout, workload), workload.prompt_tokens
    length = prompt + workload.response_tokens
    per_head = 2 * batch * length * a.head_dim * itemsize  # keys and values
    layer = a.num_query_groups * per_head
    # With padded prompts, transformers repeats keys and values for every query head.
    repeated = a.num_attention_heads * per_head
    moe = a.moe
    ffn = a.ffn_hidden_size if moe is None else moe.ffn_hidden_size * moe.num_experts_per_token
    prefill = batch * prompt * 3 * (ffn + a.hidden_size) * itemsize
    # Logits in the weights' format and in fp32, with and without noise; the noise, its logarithm.
    sampling = batch * a.vocab_size * (itemsize + 2 * _FP32 + 2 * _FP64)
    return EngineBytes(
        weights=sum(tensor_sizes(layout)) * itemsize,
        # A layer's cache is copied to grow by a token.
        kv_cache=(a.num_layers + 1) * layer,
        workspace=max(prefill, sampling, repeated),
        sync_workspace=sync_workspace(layout, itemsize=itemsize),
    )


def sync_workspace(layout: RunLayout, *, itemsize: int) -> int:
    """Bytes that the largest tensor needs on the leader while it is gathered for an engine."""
    # The ranks' shards, and the tensor they are put together to.
    return 2 * max(tensor_sizes(layout)) * itemsize


def tensor_sizes(layout: RunLayout) -> list[int]:
    """Elements of every tensor that the student's weights are sent to an engine as."""
    return [math.prod(s) for mapping in layout.student.table for s in mapping.hf.values()]
