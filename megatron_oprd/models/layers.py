"""The layer spec: Megatron's own, with a place for a tap after each layer.

With Transformer Engine the modules are Megatron's Transformer Engine modules. Without it they are
Megatron's local ones, but for two: a norm that works under sequence parallelism, and attention
through torch's scaled_dot_product_attention, which keeps no [b, heads, s, s] matrix.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

Tap = Callable[[Tensor], Tensor]


class TappedTransformerLayer(TransformerLayer):
    """A transformer layer whose output passes through a tap.

    Attributes:
        tap: Called with the output, [s, b, h] ([s/tp, b, h] under sequence parallelism), inside
            any activation recompute; what it returns goes on. None is no tap.
        runs: False for a layer past the deepest tap: it hands its input on.
    """

    tap: Tap | None = None
    runs: bool = True

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Runs the layer, then the tap."""
        if not self.runs:
            hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            # A copy, because the schedule frees a stage's output, which must not be its input.
            return hidden_states.clone(), kwargs.get("context")
        hidden_states, context = super().forward(*args, **kwargs)
        if self.tap is not None:
            hidden_states = self.tap(hidden_states)
        return hidden_states, context


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm for Megatron's local layer spec; works on [s/tp, b, h] slices as well."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> None:
        super().__init__(
            hidden_size,
            eps=eps,
            device=torch.cuda.current_device(),
            dtype=config.params_dtype,
        )
        # Megatron sums such a gradient over the tensor-parallel ranks, which see slices.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ScaledDotProductAttention(MegatronModule):
    """Causal attention through torch, for sequences padded on the right.

    No mask is needed: a real token never sees the padding behind it, and what comes out at
    padding is used nowhere.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal
        assert config.attention_dropout == 0.0
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """Attends. query [s, b, heads, dim], key and value [s, b, groups, dim] --> [s, b, h]."""
        # [s, b, n, d] --> [b, n, s, d]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        # [b, n, s, d] --> [s, b, n * d]
        return out.permute(2, 0, 1, 3).flatten(2)


def layer_spec(*, qk_norm: bool, transformer_engine: bool) -> ModuleSpec:
    """The spec of one layer.

    Args:
        qk_norm: Whether query and key heads are normalised.
        transformer_engine: Whether to take Transformer Engine's modules.
    """
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
        return ModuleSpec(module=TappedTransformerLayer, submodules=spec.submodules)
    spec = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
    attention = spec.submodules.self_attention
    submodules = dataclasses.replace(
        spec.submodules,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=dataclasses.replace(
            attention,
            submodules=dataclasses.replace(
                attention.submodules,
                core_attention=ScaledDotProductAttention,
                **({"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if qk_norm else {}),
            ),
        ),
    )
    return ModuleSpec(module=TappedTransformerLayer, submodules=submodules)


def final_norm_class(*, transformer_engine: bool) -> type:
    """The class of the final norm."""
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return RMSNorm
