"""Numbers that an engine's cost is estimated from, and the estimate."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """A model, and an engine's share of a step.

    All prompts and all responses are equally long.
    """

    itemsize: int  # bytes of a weight, and of an element of the KV cache
    num_weights: int  # elements of all tensors
    num_linear_weights: int  # those of them that are in matrices of the layers
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # of the experts of a token together, in a mixture of experts
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    prompt_tokens: int  # per prompt
    response_tokens: int  # per response
    num_sequences: int  # that the engine generates
    max_sequence_length: int  # tokens of the run's longest prompt with its response
    memory_gb: float  # of a GPU, in 10^9 bytes

    @property
    def length(self) -> int:
        """Tokens of a prompt with its response."""
        return self.prompt_tokens + self.response_tokens

    def num_at_once(self, limit: int | None) -> int:
        """Responses that are generated at the same time, if at most ``limit`` are."""
        return min(limit or self.num_sequences, self.num_sequences)

    def kv_bytes_per_token(self, *, num_gpus: int) -> int:
        """Bytes of a token's keys and values on one of ``num_gpus`` that share the heads.

        Fewer heads than GPUs are replicated.
        """
        heads = max(self.num_query_groups // num_gpus, 1)
        return 2 * self.num_layers * heads * self.head_dim * self.itemsize


@dataclass(frozen=True, kw_only=True)
class EngineBytes:
    """Memory of an engine on each of its GPUs, and capacity of its cache."""

    num_gpus: int  # of an engine
    weights: int  # share of the student's weights
    kv_cache: int  # share of the KV cache
    workspace: int  # activations and logits of the largest batch
    context: int = 0  # CUDA context of the engine's own process, awake or asleep
    bucket: int = 0  # buffer during a weight sync; only on the engine's owner
    sleeps: bool  # frees all but the context while teacher and student run
    host_bytes: int = 0  # moved to host memory by sleep, for all GPUs together
    num_tokens: int  # capacity of the cache
    max_model_len: int  # tokens of the longest prompt with its response
    # Responses of the load's length that fit at the same time, up to the engine's share and
    # rollout.max_batch_size.
    num_responses: int
    read_cache: int  # bytes of the cache when that many responses (at least one) are at their end

    @property
    def awake(self) -> int:
        """Bytes on a GPU while awake, without the bucket."""
        return self.weights + self.kv_cache + self.workspace + self.context

    @property
    def holds_longest(self) -> bool:
        """Whether the longest sequence fits into the cache."""
        return self.num_tokens >= self.max_model_len


# (setting, value), as in ("rollout.max_batch_size", 8).
SettingChange = tuple[str, Any]


@dataclass(frozen=True, kw_only=True)
class MemoryChanges:
    """Changes of settings with which an engine leaves more memory to the trainer.

    Attributes:
        cheap: Alternatives that cost little time.
        costly: Lists of alternatives that make generation slower, the least slow first.
    """

    cheap: list[SettingChange] = field(default_factory=list)
    costly: list[list[SettingChange]] = field(default_factory=list)
