"""The time of a token in a vLLM engine, from published measurements; not measured here on a GPU."""

from megatron_oprd.config.schema import RolloutConfig

# Qwen2.5's speed benchmark (qwen.readthedocs.io; vLLM 0.6.3, A100, one response): a token of the
# 0.5B model, with 24 layers, takes 1 / 311.55 s. Of that, reading its 0.988 GB takes 0.48 ms at
# 2,039 GB/s. The rest is kernels that start one after the other, scheduling and sampling.
_OVERHEAD_OF_LAYER = (1 / 311.55 - 0.988 / 2039) / 24
# An all-reduce of 4 KB with vLLM's own kernel on 2 to 8 H100 (sgl-project/sglang, pull request
# 2904: 8.5 to 9.3 microseconds). A layer has two.
_ALL_REDUCE = 9e-6


def seconds_of_token(rollout: RolloutConfig, *, num_layers: int, working: float) -> float:
    """See `EngineKind.seconds_of_token`.

    The overhead is added: with it the same benchmark's other models come out within 15%. Without
    CUDA graphs (``enforce_eager``) it is larger, by how much is not counted.
    """
    all_reduces = 2 * num_layers * _ALL_REDUCE
    is_split = rollout.vllm.tensor_model_parallel_size > 1
    return working + _OVERHEAD_OF_LAYER * num_layers + is_split * all_reduces
