"""Multi-head latent attention (https://arxiv.org/abs/2405.04434), as in DeepSeek-V3.

Megatron's own module differs between its layer specs: without Transformer Engine it splits the
matrices of the narrow states over the tensor-parallel ranks, and the gradient of the keys' shared
dimensions lacks the other ranks' heads. Here these matrices, which are small, are on every rank
under both specs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from megatron_oprd.models.architecture import Latent
from megatron_oprd.models.layers import PackedRotation
from megatron_oprd.models.rotary import RotaryTransformerConfig


class ReplicatedLinear(torch.nn.Linear):
    """A linear layer without bias that every tensor-parallel rank holds whole."""

    def __init__(
        self, input_size: int, output_size: int, *, config: RotaryTransformerConfig
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            bias=False,
            device=torch.cuda.current_device(),
            dtype=config.params_dtype,
        )
        # As with norms, Megatron then sums the gradients of the ranks' slices of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclass
class LatentSubmodules:
    """Specs or classes of the submodules, named as in Megatron's attention."""

    linear_up_proj: Any  # column-parallel: to the heads, of queries and of keys with values
    norm: Any  # of the narrow states
    core_attention: Any
    linear_proj: Any


class _LatentProjections(Attention):
    """Queries, keys and values of latent attention, before the rotation."""

    def __init__(
        self,
        config: RotaryTransformerConfig,
        submodules: LatentSubmodules,
        layer_number: int,
        *,
        latent: Latent,
        attn_mask_type: AttnMaskType,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            config,
            submodules,
            layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            pg_collection=pg_collection,
            **kwargs,
        )
        self.latent = latent
        heads = config.num_attention_heads
        query_width = heads * (latent.unrotated_dim + latent.rotated_dim)
        # Megatron's forward pass asks for the norms of heads.
        self.q_layernorm: torch.nn.Module | None = None
        self.k_layernorm = None
        if latent.query_rank is None:
            self.linear_q_proj = self._column(submodules, config.hidden_size, query_width)
        else:
            self.linear_q_down_proj = ReplicatedLinear(
                config.hidden_size, latent.query_rank, config=config
            )
            self.q_layernorm = self._norm(submodules, latent.query_rank)
            self.linear_q_up_proj = self._column(submodules, latent.query_rank, query_width)
        self.linear_kv_down_proj = ReplicatedLinear(
            config.hidden_size, latent.key_value_rank + latent.rotated_dim, config=config
        )
        self.kv_layernorm = self._norm(submodules, latent.key_value_rank)
        self.linear_kv_up_proj = self._column(
            submodules, latent.key_value_rank, heads * (latent.unrotated_dim + latent.value_dim)
        )

    def _norm(self, submodules: LatentSubmodules, width: int) -> torch.nn.Module:
        return build_module(
            submodules.norm, config=self.config, hidden_size=width, eps=self.latent.norm_epsilon
        )

    def _column(self, submodules: LatentSubmodules, inputs: int, outputs: int) -> torch.nn.Module:
        return build_module(
            submodules.linear_up_proj,
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """Query and key [s, b, heads/tp, dim] and value [s, b, heads/tp, value dim].

        ``hidden_states`` are [s, b, h], under sequence parallelism [s/tp, b, h]. Communicates on
        the tensor-parallel group.
        """
        latent, heads = self.latent, self.num_attention_heads_per_partition
        if self.q_layernorm is None:
            query, _ = self.linear_q_proj(hidden_states)
        else:
            query, _ = self.linear_q_up_proj(
                self.q_layernorm(self.linear_q_down_proj(hidden_states))
            )
        # [s/tp, b, key_value_rank + rotated_dim]
        narrow, key_rotated = self.linear_kv_down_proj(hidden_states).split(
            [latent.key_value_rank, latent.rotated_dim], dim=-1
        )
        key_value, _ = self.linear_kv_up_proj(self.kv_layernorm(narrow))
        # Every rank has the shared dimensions' gradient from its own heads. Both functions sum it.
        if self.config.sequence_parallel:
            key_rotated = gather_from_sequence_parallel_region(
                key_rotated, group=self.pg_collection.tp
            )
        else:
            key_rotated = copy_to_tensor_model_parallel_region(
                key_rotated, group=self.pg_collection.tp
            )
        # [s, b, heads/tp * dim] --> [s, b, heads/tp, dim]
        query = query.unflatten(-1, (heads, -1))
        key_value = key_value.unflatten(-1, (heads, -1))
        query, query_rotated = query.split([latent.unrotated_dim, latent.rotated_dim], dim=-1)
        key, value = key_value.split([latent.unrotated_dim, latent.value_dim], dim=-1)
        key_rotated = key_rotated.unsqueeze(2).expand(-1, -1, heads, -1)
        # Megatron rotates the first dimensions of a head. Scores do not depend on their order.
        return (
            torch.cat([query_rotated, query], dim=-1),
            torch.cat([key_rotated, key], dim=-1),
            value.contiguous(),
        )


class LatentAttention(PackedRotation, _LatentProjections):
    """Latent attention with Megatron's rotation, attention core and output projection."""
