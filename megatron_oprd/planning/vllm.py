"""Memory of a rollout engine on the trainer's GPUs, and its number of concurrent responses.

A vLLM engine takes its share of the device (``gpu_memory_utilization``) for weights, workspace and,
with the rest, KV cache; with ``kv_cache_gb`` the cache has that size, independent of the share. The
workspace is that of the largest batch, which vLLM 0.32 runs when it starts. CUDA graphs are not
counted. Tests compare the number of cache blocks with vLLM's; nothing else here is measured.
"""

import math
from dataclasses import dataclass

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.planning.parameters import layer_of
from megatron_oprd.planning.workload import Workload
from megatron_oprd.training.layout import RunLayout

_FP32, _FP64 = 4, 8


def generation_batch(layout: RunLayout, workload: Workload) -> int:
    """Number of responses generated at the same time."""
    limit = layout.config.rollout.max_batch_size
    return min(limit or workload.num_sequences, workload.num_sequences)


@dataclass(frozen=True, kw_only=True)
class EngineBytes:
    """Memory of the hf engine, in bytes."""

    weights: int  # copy of the whole student, kept between rollouts
    kv_cache: int  # at the end of the longest generation
    workspace: int  # the largest of prefill, a layer's attention and sampling
    sync_workspace: int  # for gathering the largest tensor


def engine_bytes(layout: RunLayout, workload: Workload, *, itemsize: int) -> EngineBytes:
    """Estimates the memory of the hf engine; ``itemsize`` is bytes per weight."""
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
    # Logits in the weights' type and, with and without noise, in fp32; noise and its logarithm in
    # fp64.
    sampling = batch * a.vocab_size * (itemsize + 2 * _FP32 + 2 * _FP64)
    return EngineBytes(
        weights=sum(tensor_sizes(layout)) * itemsize,
        # One layer more: appending a token copies a layer's cache.
        kv_cache=(a.num_layers + 1) * layer,
        workspace=max(prefill, sampling, repeated),
        sync_workspace=sync_workspace(layout, itemsize=itemsize),
    )


def sync_workspace(layout: RunLayout, *, itemsize: int) -> int:
    """Bytes on the leader while the largest tensor is gathered for an engine."""
    # The ranks' shards, and the whole tensor.
    return 2 * max(tensor_sizes(layout)) * itemsize


def tensor_sizes(layout: RunLayout) -> list[int]:
    """Elements of every tensor in which the student's weights are sent to an engine."""
    return [math.prod(s) for mapping in layout.student.table for s in mapping.hf.values()]


_FP8, _FP32, _INT64 = 1, 4, 8
# CUDA context of a second process on a device, awake or asleep; an assumption.
CONTEXT_BYTES = 500_000_000
# vLLM's tokens per KV-cache block on a GPU. One block is never used.
BLOCK_TOKENS = 16
# vLLM's default maximum batch (tokens, responses), by whether the GPU has 70 GiB or more.
_LARGE_GPU = 70 * 2**30
_BATCH_TOKENS = {True: 16_384, False: 8_192}
_BATCH_RESPONSES = {True: 1_024, False: 256}


@dataclass(frozen=True, kw_only=True)
class VLLMBytes:
    """Memory of an engine on each of its GPUs, and capacity of its cache."""

    num_gpus: int  # of an engine: the first of its replica
    weights: int  # share of the student's weights
    kv_cache: int  # share of the KV cache
    workspace: int  # activations and logits of the largest batch
    bucket: int  # buffer of the weight sync; only on the replica's leader
    sleeps: bool  # frees all but the bucket and the CUDA context while teacher and student run
    host_bytes: int  # moved to host memory by sleep, for all GPUs together
    num_tokens: int  # capacity of the cache
    max_model_len: int  # tokens of the longest prompt with its response
    # Responses of maximum length that fit at the same time, up to the replica's step and
    # rollout.max_batch_size.
    num_responses: int

    @property
    def awake(self) -> int:
        """Bytes on a GPU while awake, without the bucket."""
        return self.weights + self.kv_cache + self.workspace + CONTEXT_BYTES


def has_embedded_vllm(layout: RunLayout) -> bool:
    """Whether rollouts come from vLLM engines on the trainer's GPUs."""
    rollout = layout.config.rollout
    return rollout.engine == "vllm" and not rollout.vllm.uses_server


def vllm_bytes(
    layout: RunLayout, workload: Workload, *, itemsize: int, memory_gb: float
) -> VLLMBytes:
    """Estimates an engine's memory on a GPU with ``memory_gb`` (10^9 bytes).

    ``itemsize`` is bytes per weight and per element of the cache.
    """
    rollout, a = layout.config.rollout, layout.student.architecture
    vllm, size = rollout.vllm, rollout.vllm.tensor_model_parallel_size
    weights = -(-_weight_bytes(layout, itemsize) // size)
    length = workload.prompt_tokens + workload.response_tokens
    max_model_len = vllm.max_model_len or layout.max_sequence_length
    workspace = _workspace(
        a, size=size, itemsize=itemsize, max_model_len=max_model_len,
        max_batch_size=rollout.max_batch_size, is_large=memory_gb * 1e9 >= _LARGE_GPU,
    )  # fmt: skip
    if vllm.kv_cache_gb is None:
        share = round(vllm.gpu_memory_utilization * memory_gb * 1e9)
        kv_cache = max(share - weights - workspace, 0)
    else:
        kv_cache = round(vllm.kv_cache_gb * 1e9)
    blocks = num_blocks(a, kv_cache, size=size, itemsize=itemsize)
    usable = max(blocks - 1, 0)
    return VLLMBytes(
        num_gpus=size,
        weights=weights,
        kv_cache=kv_cache,
        workspace=workspace,
        bucket=vllm.sync_bucket_mb * 10**6,
        # One step off-policy, it generates during the teacher's and student's passes and cannot
        # sleep.
        sleeps=vllm.sleep_level > 0 and not rollout.one_step_off_policy,
        host_bytes=weights * size if vllm.sleep_level == 1 else 0,
        num_tokens=usable * BLOCK_TOKENS,
        max_model_len=max_model_len,
        num_responses=min(usable // -(-length // BLOCK_TOKENS), generation_batch(layout, workload)),
    )


def _weight_bytes(layout: RunLayout, itemsize: int) -> int:
    """Bytes of the student's weights in an engine; FP8 scales are omitted."""
    in_fp8 = layout.config.rollout.vllm.quantization is not None
    total = 0
    for mapping in layout.student.table:
        is_linear = layer_of(mapping.megatron) is not None and not mapping.is_replicated
        for shape in mapping.hf.values():
            is_quantised = in_fp8 and is_linear and len(shape) == 2
            total += math.prod(shape) * (_FP8 if is_quantised else itemsize)
    return total


def num_blocks(
    a: Architecture, kv_cache: int, *, size: int, itemsize: int, block_tokens: int = BLOCK_TOKENS
) -> int:
    """KV-cache blocks on one GPU, counted as vLLM does.

    ``kv_cache`` is in bytes per GPU; ``size`` GPUs share the heads, and replicate them if there are
    fewer heads than GPUs.
    """
    of_token = kv_bytes_per_token(a, size=size, itemsize=itemsize)
    return kv_cache // (of_token * block_tokens)


def kv_bytes_per_token(a: Architecture, *, size: int, itemsize: int) -> int:
    """Bytes of a token's keys and values on one of ``size`` GPUs; see `num_blocks`."""
    return 2 * a.num_layers * max(a.num_query_groups // size, 1) * a.head_dim * itemsize


def check_kv_cache(engine: VLLMBytes | None, layout: RunLayout, *, memory_gb: float) -> None:
    """Raises UserError if the longest sequence exceeds the KV cache: vLLM would not start."""
    if engine is None or holds_longest(engine):
        return
    vllm = layout.config.rollout.vllm
    of_cache = f"{engine.kv_cache / 1e9:.2f} GB of KV cache"
    if vllm.kv_cache_gb is not None:
        setting = f"rollout.vllm.kv_cache_gb = {vllm.kv_cache_gb:g}"
        advice = "Give more, or shorter prompts and responses"
    else:
        setting = f"rollout.vllm.gpu_memory_utilization = {vllm.gpu_memory_utilization:g}"
        of_cache = (
            f"of {vllm.gpu_memory_utilization * memory_gb:.1f} GB weights take "
            f"{engine.weights / 1e9:.1f} and working memory {engine.workspace / 1e9:.1f}, which "
            f"leaves {of_cache}"
        )
        advice = "Give more, a lower rollout.max_batch_size, or shorter prompts and responses"
    raise UserError(
        f"{setting}: {of_cache}, room for {engine.num_tokens} tokens; the longest prompt with its "
        f"response has {engine.max_model_len}. {advice}"
    )


def holds_longest(engine: VLLMBytes) -> bool:
    """Whether the longest sequence fits into the cache; vLLM does not start otherwise."""
    return engine.num_tokens >= engine.max_model_len


def _workspace(
    a: Architecture,
    *,
    size: int,
    itemsize: int,
    max_model_len: int,
    max_batch_size: int | None,
    is_large: bool,
) -> int:
    """Bytes of the largest batch's forward pass or of its sampling, whichever is larger."""
    responses = max_batch_size or _BATCH_RESPONSES[is_large]
    tokens = min(_BATCH_TOKENS[is_large], responses * max_model_len)
    moe = a.moe
    ffn = a.ffn_hidden_size if moe is None else moe.ffn_hidden_size * moe.num_experts_per_token
    # Gate, up and their product; residual, its norm, the MLP's input and output.
    forward = tokens * (3 * ffn // size + 4 * a.hidden_size) * itemsize
    # Logits in the weights' format and in fp32, their log-probabilities; sorted, with their order.
    sampling = min(responses, tokens) * a.vocab_size * (itemsize + 3 * _FP32 + _INT64)
    return max(forward, sampling)
