"""What a vLLM engine adds to a token, from published measurements; not measured here on a GPU."""

# Qwen2.5's speed benchmark (qwen.readthedocs.io; vLLM 0.6.3, A100, one response): a token of the
# 0.5B model, with 24 layers, takes 1 / 311.55 s. Of that, reading its 0.988 GB takes 0.48 ms at
# 2,039 GB/s. The rest is kernels that start one after the other, scheduling and sampling.
_OVERHEAD_OF_LAYER = (1 / 311.55 - 0.988 / 2039) / 24
# GPUs of an engine: seconds of an all-reduce of 4 KiB and of 512 KiB with vLLM's own kernel on
# H100 (sgl-project/sglang, pull request 2904).
_ALL_REDUCE = {2: (8.8e-6, 17.7e-6), 4: (8.5e-6, 26.9e-6), 8: (9.3e-6, 30.4e-6)}
_SMALL, _LARGE = 4 * 2**10, 512 * 2**10


def overhead_of_token(num_layers: int, num_gpus: int, message_bytes: int) -> float:
    """Seconds between two tokens beside the GPUs' own work, with CUDA graphs.

    Added to this work, the same benchmark's other models come out within 15%. Layers that are
    divided over GPUs have two all-reduces of ``message_bytes`` each. Without CUDA graphs
    (``enforce_eager``) the overhead is larger; by how much is not counted.
    """
    overhead = _OVERHEAD_OF_LAYER * num_layers
    if num_gpus == 1:
        return overhead
    # Of other numbers of GPUs, as of the next larger one, at most eight.
    small, large = _ALL_REDUCE[next((size for size in _ALL_REDUCE if size >= num_gpus), 8)]
    of_byte = (large - small) / (_LARGE - _SMALL)
    return overhead + 2 * num_layers * (small + of_byte * max(message_bytes - _SMALL, 0))
