"""Adds the outputs of attention and MLP to the residual, where a family does more than add."""

from collections.abc import Callable
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ResidualAdd(MegatronModule):
    """Normalises and scales an output [s, b, h], then adds it; stands for Megatron's function.

    The norm is that of transformers' GLM-4 (``post_self_attn_layernorm``) and OLMo-2
    (``post_attention_layernorm``), the factor that of Granite (``residual_multiplier``).
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        norm: type | None,  # None: no norm
        multiplier: float,  # on the output, after the norm
    ) -> None:
        super().__init__(config)
        self._multiplier = multiplier
        self.norm = None
        if norm is not None:
            self.norm = build_module(
                norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """The function that adds, called as Megatron calls its own."""
        add = get_bias_dropout_add(training, fused)

        def add_changed(
            output_with_bias: tuple[Tensor, Tensor | None], *args: Any, **kwargs: Any
        ) -> Tensor:
            output, bias = output_with_bias
            # The bias belongs to the output that is normalised.
            output = output if bias is None else output + bias
            if self.norm is not None:
                output = self.norm(output)
            if self._multiplier != 1.0:
                output = output * self._multiplier
            return add((output, None), *args, **kwargs)

        return add_changed
