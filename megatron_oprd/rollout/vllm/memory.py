"""Memory of a vLLM engine on the trainer's GPUs, and its number of concurrent responses.

An engine takes its share of the device (``gpu_memory_utilization``) for weights, workspace and,
with the rest, KV cache; with ``kv_cache_gb`` the cache has that size, independent of the share. The
workspace is that of the largest batch, which vLLM 0.32 runs when it starts. CUDA graphs are not
counted. Tests compare the number of cache blocks with vLLM's; nothing else here is measured.
"""

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.config.schema import RolloutConfig
from megatron_oprd.errors import UserError
from megatron_oprd.rollout.costs import EngineBytes, EngineLoad, MemoryChanges, SettingChange

_FP8, _FP32, _INT64 = 1, 4, 8
# CUDA context of a second process on a device, awake or asleep; an assumption.
CONTEXT_BYTES = 500_000_000
# vLLM's tokens per KV-cache block on a GPU. One block is never used.
BLOCK_TOKENS = 16
# vLLM's default maximum batch (tokens, responses), by whether the GPU has 70 GiB or more.
_LARGE_GPU = 70 * 2**30
_BATCH_TOKENS = {True: 16_384, False: 8_192}
_BATCH_RESPONSES = {True: 1_024, False: 256}


def vllm_bytes(rollout: RolloutConfig, load: EngineLoad) -> EngineBytes:
    """Estimates an engine's memory on a GPU."""
    vllm, size = rollout.vllm, rollout.vllm.tensor_model_parallel_size
    weights = -(-_weight_bytes(vllm, load) // size)
    max_model_len = vllm.max_model_len or load.max_sequence_length
    workspace = _workspace(rollout, load, max_model_len=max_model_len)
    if vllm.kv_cache_gb is None:
        share = round(vllm.gpu_memory_utilization * load.memory_gb * 1e9)
        kv_cache = max(share - weights - workspace, 0)
    else:
        kv_cache = round(vllm.kv_cache_gb * 1e9)
    of_token = load.kv_bytes_per_token(num_gpus=size)
    usable = max(num_blocks(kv_cache, bytes_per_token=of_token) - 1, 0)
    num_responses = min(
        usable // -(-load.length // BLOCK_TOKENS), load.num_at_once(rollout.max_batch_size)
    )
    return EngineBytes(
        num_gpus=size,
        weights=weights,
        kv_cache=kv_cache,
        workspace=workspace,
        context=CONTEXT_BYTES,
        # vLLM's buffer has to hold the largest tensor.
        bucket=max(vllm.chunk_bytes, load.vocab_size * load.hidden_size * load.itemsize),
        # One step ahead, it generates during the teacher's and student's passes and cannot sleep.
        sleeps=vllm.sleep_level > 0 and not rollout.steps_ahead,
        host_bytes=weights * size if vllm.sleep_level == 1 else 0,
        num_tokens=usable * BLOCK_TOKENS,
        max_model_len=max_model_len,
        num_responses=num_responses,
        read_cache=max(num_responses, 1) * load.length * of_token,
    )


def _weight_bytes(vllm: VLLMConfig, load: EngineLoad) -> int:
    """Bytes of the student's weights in an engine; FP8 scales are omitted."""
    in_fp8 = load.num_linear_weights if vllm.quantization is not None else 0
    return (load.num_weights - in_fp8) * load.itemsize + in_fp8 * _FP8


def num_blocks(kv_cache: int, *, bytes_per_token: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """KV-cache blocks on one GPU, counted as vLLM does.

    ``kv_cache`` and `EngineLoad.kv_bytes_per_token` are in bytes per GPU.
    """
    return kv_cache // (bytes_per_token * block_tokens)


def check_kv_cache(vllm: VLLMConfig, engine: EngineBytes, *, memory_gb: float) -> None:
    """Raises UserError if the longest sequence exceeds the KV cache: vLLM would not start."""
    if engine.holds_longest:
        return
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


def memory_changes(vllm: VLLMConfig) -> MemoryChanges:
    """Sleep; then a smaller cache, or engines that do not generate while the trainer computes."""
    if vllm.uses_server:
        return MemoryChanges()
    if vllm.kv_cache_gb is not None:
        caches = [vllm.kv_cache_gb / divisor for divisor in (2, 4, 8)]
        sizes = [("rollout.vllm.kv_cache_gb", gb) for gb in caches]
    else:
        shares = [round(vllm.gpu_memory_utilization - less, 2) for less in (0.1, 0.2, 0.3)]
        sizes = [("rollout.vllm.gpu_memory_utilization", share) for share in shares]
    return MemoryChanges(
        cheap=[("rollout.vllm.sleep_level", 2)],
        costly=[[*sizes], [("rollout.max_staleness", 0)]],
    )


# Shares of a GPU to choose from; more than this leaves a trainer little.
_SHARES = (0.25, 0.4, 0.55, 0.7)


def alternatives(vllm: VLLMConfig, *, gpus_per_node: int) -> list[tuple[SettingChange, ...]]:
    """GPUs of an engine, which are of one node, with shares of them, or with the given cache."""
    if vllm.uses_server:
        return [()]
    sizes = [size for size in range(1, gpus_per_node + 1) if gpus_per_node % size == 0]
    shares: list[tuple[SettingChange, ...]] = [()]
    if vllm.kv_cache_gb is None:
        of_gpu = sorted({*_SHARES, vllm.gpu_memory_utilization})
        shares = [(("rollout.vllm.gpu_memory_utilization", share),) for share in of_gpu]
    return [
        (("rollout.vllm.tensor_model_parallel_size", size), *share)
        for size in sizes
        for share in shares
    ]


def _workspace(rollout: RolloutConfig, load: EngineLoad, *, max_model_len: int) -> int:
    """Bytes of the largest batch's forward pass or of its sampling, whichever is larger."""
    is_large = load.memory_gb * 1e9 >= _LARGE_GPU
    responses = rollout.max_batch_size or _BATCH_RESPONSES[is_large]
    tokens = min(_BATCH_TOKENS[is_large], responses * max_model_len)
    size = rollout.vllm.tensor_model_parallel_size
    # Gate, up and their product; residual, its norm, the MLP's input and output.
    of_token = 3 * load.ffn_hidden_size // size + 4 * load.hidden_size
    forward = tokens * of_token * load.itemsize
    # Logits in the weights' format and in fp32, their log-probabilities; sorted, with their order.
    of_response = load.vocab_size * (load.itemsize + 3 * _FP32 + _INT64)
    return max(forward, min(responses, tokens) * of_response)


def loses_weights(sleep_level: int) -> bool:
    """Whether an engine that has slept lacks its weights, so that all have to be sent again."""
    return sleep_level == 2
