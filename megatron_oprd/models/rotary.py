"""Rotary position embeddings: the frequencies of every rope type, and how Megatron gets them.

Megatron's rotary module computes cosine and sine from given frequencies, under sequence, pipeline
and context parallelism alike, and rotates as many dimensions as there are frequencies for. So a
rope type here consists of its frequencies, and of an attention factor (yarn's, longrope's).
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_oprd.models.architecture import Architecture, Rope


@dataclass
class RotaryTransformerConfig(TransformerConfig):
    """Megatron's configuration with fields that its attention lacks."""

    # Megatron's attention multiplies cosine and sine by YaRN's concentration factor if these fields
    # exist, whatever the rope type. The factor is (0.1 m ln(s) + 1) / (0.1 n ln(s) + 1) of mscale
    # m, scaling factor s and mscale_all_dim n. With s = e^10 and n = 0 it is m + 1. Fused rotation
    # ignores it, so apply_rope_fusion stays off where it is not 1.
    yarn_mscale: float = 0.0
    yarn_rotary_scaling_factor: float = math.exp(10)
    yarn_mscale_all_dim: float = 0.0
    # yarn_mscale of layers with a sliding window, which then have their own frequencies as well;
    # None: all layers are alike.
    sliding_yarn_mscale: float | None = None
    # Whether attention's output projection has a bias; add_bias_linear is the MLP's.
    attention_output_bias: bool = False
    score_softcap: float | None = None  # as `Architecture`'s


class RotaryByKind(torch.nn.Module):
    """Megatron's rotary module twice: for layers without and with a sliding window.

    transformers' OLMo-3 and Gemma 3 have a rotary embedding for each kind of layer.
    """

    def __init__(self, of_others: RotaryEmbedding, of_sliding: RotaryEmbedding) -> None:
        super().__init__()
        self.of_others, self.of_sliding = of_others, of_sliding

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Both embeddings, [2, s, 1, 1, dim]; `PackedSelfAttention` takes its layer's."""
        return torch.stack([self.of_others(*args, **kwargs), self.of_sliding(*args, **kwargs)])

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """The length that Megatron's model asks for, the same for both."""
        return self.of_others.get_rotary_seq_len(*args, **kwargs)


def set_frequencies(
    model: GPTModel, architecture: Architecture, *, max_sequence_length: int, device: torch.device
) -> None:
    """Sets a chunk's rotary frequencies, from `inverse_frequencies`."""
    latent = architecture.latent
    head_dim = architecture.head_dim if latent is None else latent.rotated_dim

    def frequencies(rope: Rope) -> Tensor:
        return inverse_frequencies(
            rope, head_dim=head_dim, max_sequence_length=max_sequence_length
        ).to(device)

    model.rotary_pos_emb.inv_freq = frequencies(architecture.rope)
    if architecture.sliding_rope is not None:
        # A copy with frequencies of its own; it has no parameters.
        of_sliding = copy.copy(model.rotary_pos_emb)
        of_sliding.inv_freq = frequencies(architecture.sliding_rope)
        model.rotary_pos_emb = RotaryByKind(model.rotary_pos_emb, of_sliding)


def has_fused_rotation(architecture: Architecture) -> bool:
    """Whether Transformer Engine's kernel computes the model's rotation.

    It has no attention factor, and latent attention rotates by a function of its own.
    """
    ropes = (architecture.rope, architecture.sliding_rope or architecture.rope)
    return architecture.latent is None and all(rope.attention_factor == 1.0 for rope in ropes)


def inverse_frequencies(rope: Rope, *, head_dim: int, max_sequence_length: int) -> Tensor:
    """The angle in radians per position of each pair of a head's dimensions.

    Returns [rotary dimensions / 2] in fp32 on the CPU, bit-identical to transformers.
    """
    dim = rope.rotary_dim(head_dim)
    turns = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.rope_type == "longrope":
        assert rope.original_max_position_embeddings is not None
        # transformers decides for each batch by its longest sequence, so numbers depend on the
        # batch. Here the longest sequence that the run allows (in tokens) decides for the whole
        # run.
        long = max_sequence_length > rope.original_max_position_embeddings
        factors = rope.long_factor if long else rope.short_factor
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * turns)
    frequencies = 1.0 / turns
    if rope.rope_type == "linear":
        assert rope.factor is not None
        return frequencies / rope.factor
    if rope.rope_type == "yarn":
        return _yarn(turns, dim, rope)
    # "dynamic" has other ones past max_position_embeddings only, which no run's sequences reach.
    return _llama3(frequencies, rope) if rope.rope_type == "llama3" else frequencies


def _yarn(turns: Tensor, dim: int, rope: Rope) -> Tensor:
    """Divides slow frequencies by ``factor``, keeps fast ones, with a ramp over the pairs between.

    A pair counts as fast that turns ``beta_fast`` times over the original length, and as slow if it
    turns ``beta_slow`` times (https://arxiv.org/abs/2309.00071).
    """
    original, factor = rope.original_max_position_embeddings, rope.factor
    assert original is not None
    assert factor is not None

    def pair_with(turns_in_all: float | None) -> float:
        assert turns_in_all is not None
        length_of_turn = original / (turns_in_all * 2 * math.pi)
        return (dim * math.log(length_of_turn)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # As in transformers, which avoids a division by zero in this way.
    high += 0.001 if low == high else 0
    divided = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - divided
    return (1.0 / (factor * turns)) * (1 - kept) + (1.0 / turns) * kept


def _llama3(frequencies: Tensor, rope: Rope) -> Tensor:
    """Divides slow frequencies by ``factor``, keeps fast ones, interpolates in between."""
    original, factor = rope.original_max_position_embeddings, rope.factor
    low, high = rope.low_freq_factor, rope.high_freq_factor
    assert original is not None
    assert factor is not None
    assert low is not None
    assert high is not None
    wavelengths = 2 * math.pi / frequencies
    kept = (original / wavelengths - low) / (high - low)
    between = (1 - kept) * frequencies / factor + kept * frequencies
    slow, fast = wavelengths > original / low, wavelengths < original / high
    return torch.where(slow, frequencies / factor, torch.where(fast, frequencies, between))
