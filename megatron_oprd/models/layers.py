"""The layer spec: Megatron's own, with a place for a tap after each layer.

With Transformer Engine the modules are Megatron's Transformer Engine modules. Without it they are
Megatron's local ones, but for two: a norm that works under sequence parallelism, and attention
through torch's scaled_dot_product_attention, which keeps no [b, heads, s, s] matrix. In both,
packed sequences are rotated without a question to the device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_oprd.models.rotary import RotaryTransformerConfig
from megatron_oprd.parallel.layout import context_parallel_positions

Tap = Callable[[Tensor], Tensor]


@dataclasses.dataclass(kw_only=True)
class HostPackedSeqParams(PackedSeqParams):
    """Packed sequences, with what else Megatron's layers would ask the device for.

    To ask would hold up every layer of every micro-batch.

    Attributes:
        lengths: Tokens of each sequence.
        positions: The place of each token in its sequence, [s], int64, on the device.
    """

    lengths: tuple[int, ...] = ()
    positions: Tensor


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


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention, which rotates packed sequences by their tokens' positions.

    Megatron's own rotation of packed sequences cuts them apart, and for that asks the device for
    their lengths, for query and key of every layer. The numbers are the same.
    """

    config: RotaryTransformerConfig
    _frequencies: Tensor | None = None

    def forward(
        self,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends; the rotation goes to `get_query_key_value_tensors` if sequences are packed."""
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, HostPackedSeqParams)
            assert rotary_pos_emb is not None
            # [longest, 1, 1, dim] --> [s, 1, 1, dim]
            self._frequencies = rotary_pos_emb[packed_seq_params.positions]
            rotary_pos_emb = None
        try:
            return super().forward(
                *args,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
        finally:
            self._frequencies = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Query [s, b, heads, dim], key and value [s, b, groups, dim], rotated where packed."""
        query, key, *others = super().get_query_key_value_tensors(*args, **kwargs)
        if self._frequencies is not None:
            query, key = (
                apply_rotary_pos_emb(
                    x,
                    self._frequencies,
                    self.config,
                    mscale=self.config.yarn_mscale + 1.0,
                    cp_group=self.pg_collection.cp,
                )
                for x in (query, key)
            )
        return query, key, *others


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
    """Causal attention through torch, for sequences padded on the right, or packed.

    No mask is needed: a real token never sees the padding behind it, and what comes out at
    padding is used nowhere. Packed sequences are attended one by one, at their own lengths.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.cp_group = pg_collection.cp
        assert attn_mask_type == AttnMaskType.causal
        assert config.attention_dropout == 0.0
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attends. query [s, b, heads, dim], key and value [s, b, groups, dim] --> [s, b, h].

        Under context parallelism s is this rank's share of the sequence, on both sides. Packed
        sequences come and go without b.
        """
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, HostPackedSeqParams)
            lengths = packed_seq_params.lengths
            parts = zip(*(x.unsqueeze(1).split(lengths) for x in (query, key, value)), strict=True)
            return torch.cat([self._attend(*part) for part in parts]).squeeze(1)
        return self._attend(query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = None
        if self.cp_group.size() > 1:
            key, value, mask = self._gather(key, value)
        # [s, b, n, d] --> [b, n, s, d]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        # [b, n, s, d] --> [s, b, n * d]
        return out.permute(2, 0, 1, 3).flatten(2)

    def _gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the whole sequence, and what this rank's queries may see of them.

        [s/cp, b, groups, dim] --> [s, b, groups, dim], in the ranks' order; mask [s/cp, s].
        """
        size, rank = self.cp_group.size(), self.cp_group.rank()
        length = key.shape[0] * size
        positions = [
            context_parallel_positions(length, rank=r, size=size).to(key.device)
            for r in range(size)
        ]
        key, value = (
            gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value)
        )
        return key, value, positions[rank][:, None] >= torch.cat(positions)


def layer_spec(*, qk_norm: bool, num_experts: int | None, transformer_engine: bool) -> ModuleSpec:
    """The spec of one layer.

    Args:
        qk_norm: Whether query and key heads are normalised.
        num_experts: Experts of the layer; None is a dense MLP. The local ones run one after the
            other, Transformer Engine's in one grouped GEMM.
        transformer_engine: Whether to take Transformer Engine's modules.
    """
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=num_experts is not None, qk_layernorm=qk_norm
        )
        attention = dataclasses.replace(spec.submodules.self_attention, module=PackedSelfAttention)
        return ModuleSpec(
            module=TappedTransformerLayer,
            submodules=dataclasses.replace(spec.submodules, self_attention=attention),
        )
    spec = get_gpt_layer_local_spec(
        num_experts=num_experts, qk_layernorm=qk_norm, normalization="RMSNorm"
    )
    attention = spec.submodules.self_attention
    names = dict(spec.submodules.sharded_state_dict_keys_map)
    if num_experts is not None:
        # Transformer Engine does not fuse this norm in front of experts, so that it has a name of
        # its own in Megatron's checkpoints.
        del names["pre_mlp_layernorm."]
    submodules = dataclasses.replace(
        spec.submodules,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        sharded_state_dict_keys_map=names,
        self_attention=dataclasses.replace(
            attention,
            module=PackedSelfAttention,
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
