"""Gated DeltaNet, the linear attention of Qwen3-Next, and the gated attention beside it.

Megatron's own DeltaNet needs a package of GPU kernels and refuses packed sequences. Here the rule
is in plain torch, and packed sequences go through one by one, each from a state of zero. Parameters
are ordered by key head, as in the files, so that ranks take equal runs of rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_oprd.models.architecture import DeltaNet
from megatron_oprd.models.delta_rule import gated_delta_rule
from megatron_oprd.models.layers import HostPackedSeqParams, PackedSelfAttention

# Added to the squares of a query or key before the root; transformers' own number.
_NORM_EPSILON = 1e-6


@dataclass
class DeltaSubmodules:
    """Specs or classes of the linear layers."""

    in_proj: Any  # column-parallel
    out_proj: Any  # row-parallel


class GatedDeltaNet(MegatronModule):
    """``linear_attn`` of transformers' Qwen3-Next; stands in the place of a layer's attention."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DeltaSubmodules,
        layer_number: int,
        *,
        delta: DeltaNet,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,
    ) -> None:
        super().__init__(config)
        self.delta = delta
        self.tp_group = pg_collection.tp
        ranks = self.tp_group.size()
        value_heads = delta.num_key_heads * delta.values_per_key
        widths = {
            "in_proj_qkvz": 2 * delta.num_key_heads * delta.key_dim
            + 2 * value_heads * delta.value_dim,
            "in_proj_ba": 2 * value_heads,
        }
        for name, width in widths.items():
            linear = build_module(
                submodules.in_proj,
                config.hidden_size,
                width,
                config=config,
                init_method=config.init_method,
                gather_output=False,
                bias=False,
                skip_bias_add=False,
                is_expert=False,
                tp_group=self.tp_group,
            )
            self.add_module(name, linear)
        channels = delta.num_key_heads * delta.channels_per_key
        self.conv_weight = self._split(config, channels // ranks, 1, delta.kernel_size)
        self.dt_bias = self._split(config, value_heads // ranks)
        self.log_decay = self._split(config, value_heads // ranks)
        self.norm_weight = self._parameter(config, delta.value_dim)
        self.out_proj = build_module(
            submodules.out_proj,
            value_heads * delta.value_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def _parameter(self, config: TransformerConfig, *shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(
            torch.empty(*shape, device=torch.cuda.current_device(), dtype=config.params_dtype)
        )

    def _split(self, config: TransformerConfig, *shape: int) -> torch.nn.Parameter:
        parameter = self._parameter(config, *shape)
        # Otherwise Megatron would count it on one rank only, in the norm of the gradients.
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] --> [s, b, h]; under sequence parallelism both are [s/tp, b, h].

        Sequences are right-padded, or packed; no token sees the padding behind it. Communicates on
        the tensor-parallel group.
        """
        qkvz, _ = self.in_proj_qkvz(hidden_states)  # [s, b, channels and gates of this rank]
        ba, _ = self.in_proj_ba(hidden_states)
        if packed_seq_params is None:
            mixed = self._mix(qkvz, ba)
        else:
            assert isinstance(packed_seq_params, HostPackedSeqParams)
            lengths = packed_seq_params.lengths
            parts = zip(qkvz.split(lengths), ba.split(lengths), strict=True)
            mixed = torch.cat([self._mix(*part) for part in parts])
        return self.out_proj(mixed)

    def _mix(self, qkvz: Tensor, ba: Tensor) -> Tensor:
        """One sequence, or padded ones: [s, b, ...] --> [s, b, value heads/tp * value dim]."""
        delta, length = self.delta, qkvz.shape[0]
        of_values = delta.values_per_key * delta.value_dim
        # [s, b, x] --> [s, b, key heads/tp, ...]
        qkv, gate = qkvz.unflatten(-1, (-1, delta.channels_per_key + of_values)).split(
            [delta.channels_per_key, of_values], dim=-1
        )
        strength, step = ba.unflatten(-1, (-1, 2 * delta.values_per_key)).chunk(2, dim=-1)
        # [s, b, key heads/tp, channels] --> [b, key heads/tp * channels, s], with as many zeros in
        # front as the kernel looks back.
        channels = F.pad(qkv.flatten(2).permute(1, 2, 0), (delta.kernel_size - 1, 0))
        channels = F.silu(F.conv1d(channels, self.conv_weight, groups=channels.shape[1]))
        # [b, key heads/tp * channels, s] --> [b, key heads/tp, s, channels]
        qkv = channels.unflatten(1, (-1, delta.channels_per_key)).mT.float()
        query, key, value = qkv.split([delta.key_dim, delta.key_dim, of_values], dim=-1)
        # [b, key heads/tp, s, heads * dim] --> [b, value heads/tp, s, dim]
        value = value.unflatten(-1, (delta.values_per_key, -1)).transpose(2, 3).flatten(1, 2)
        query, key = (_unit(x).repeat_interleave(delta.values_per_key, dim=1) for x in (query, key))
        # [s, b, key heads/tp, heads] --> [b, value heads/tp, s]
        strength, step = (x.flatten(2).permute(1, 2, 0) for x in (strength, step))
        decay = -self.log_decay.float().exp()[:, None] * F.softplus(
            step.float() + self.dt_bias[:, None]
        )
        out = gated_delta_rule(
            query * delta.key_dim**-0.5,
            key,
            value,
            decay=decay,
            strength=strength.sigmoid().float(),
        ).to(qkvz.dtype)
        # [b, value heads/tp, s, dim] --> [s, b, value heads/tp, dim]
        out, gate = out.permute(2, 0, 1, 3), gate.reshape(length, out.shape[0], out.shape[1], -1)
        return self._normalise(out, gate).flatten(2)

    def _normalise(self, x: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm of each head, then its gate."""
        in_fp32 = x.float()
        scale = torch.rsqrt(in_fp32.pow(2).mean(-1, keepdim=True) + self.config.layernorm_epsilon)
        # Every rank has the weight's gradient from its own heads: this sums it.
        weight = copy_to_tensor_model_parallel_region(self.norm_weight, group=self.tp_group)
        return (weight * (in_fp32 * scale).to(x.dtype) * F.silu(gate.float())).to(x.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The parameters for Megatron's checkpoints, with those that ranks share split by rows."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        assert metadata is not None
        split = ("conv_weight", "dt_bias", "log_decay")
        return state | make_sharded_tensors_for_checkpoint(
            {name: getattr(self, name) for name in split},
            prefix,
            dict.fromkeys(split, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class GatedSelfAttention(PackedSelfAttention):
    """Megatron's attention with a gate on its output, also with fewer key heads than ranks."""

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Query, key, value and gate; query and gate are [s, b, heads/tp, dim]."""
        query, key, value, gate = super().get_query_key_value_tensors(*args, **kwargs)
        # Ranks that share a key head have all its query heads' gates, of which each needs its own.
        count = query.shape[2]
        if gate.shape[2] != count:
            place = get_tensor_model_parallel_rank() % (gate.shape[2] // count)
            gate = gate[:, :, place * count : (place + 1) * count]
        return query, key, value, gate


def _unit(x: Tensor) -> Tensor:
    """Scales vectors to length 1."""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + _NORM_EPSILON)
