"""The layer spec: Megatron's own, with a tap after each layer.

With Transformer Engine, the modules are Megatron's Transformer Engine modules. Without it they are
Megatron's local ones except for two: a norm that works under sequence parallelism, and attention
through torch's scaled_dot_product_attention, which keeps no [b, heads, s, s] matrix. Both specs
rotate packed sequences without synchronizing with the device.
"""

import contextlib
import copy
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
from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from megatron_oprd.models.rotary import RotaryTransformerConfig
from megatron_oprd.models.sinks import mark_sinks, with_sinks, without_sinks
from megatron_oprd.models.softcap import softcapped_attention
from megatron_oprd.parallel.layout import context_parallel_positions

Tap = Callable[[Tensor], Tensor]


@dataclasses.dataclass(kw_only=True)
class HostPackedSeqParams(PackedSeqParams):
    """Packed sequences, with data for which Megatron's layers would otherwise wait for the device.

    Such a wait would stall every layer of every micro-batch.
    """

    lengths: tuple[int, ...] = ()  # tokens of each sequence
    positions: Tensor  # [s], int64, on the device: each token's position in its sequence


class TappedTransformerLayer(TransformerLayer):
    """A transformer layer whose output passes through a tap."""

    # Called with the output [s, b, h] ([s/tp, b, h] under sequence parallelism), inside any
    # activation recompute. Its result replaces the output.
    tap: Tap | None = None
    runs: bool = True  # False past the deepest tap: the layer passes its input on

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Megatron adds outputs to residuals with gradients enabled in every pass. Norms that are
        # part of the addition would keep their inputs where nobody wants a gradient.
        self.bias_dropout_add_exec_handler = contextlib.nullcontext

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Runs the layer, then the tap."""
        if not self.runs:
            hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            # The schedule frees a stage's output, so it must not be the stage's input.
            return hidden_states.clone(), kwargs.get("context")
        hidden_states, context = super().forward(*args, **kwargs)
        if self.tap is not None:
            hidden_states = self.tap(hidden_states)
        return hidden_states, context


class PackedRotation(Attention):
    """An attention of Megatron's, rotating packed sequences by their tokens' positions.

    Gives the numbers of Megatron's own rotation, which splits packed sequences and for that reads
    their lengths from the device, for query and key of every layer.
    """

    config: RotaryTransformerConfig
    # Set only during a forward pass of packed sequences.
    _frequencies: Tensor | None = None

    def __init__(
        self, config: RotaryTransformerConfig, submodules: Any, layer_number: int, **kwargs: Any
    ) -> None:
        # Where layers with a sliding window have a rotation of their own, whether this one has it.
        self._kind: int | None = None
        of_sliding = config.sliding_yarn_mscale
        if of_sliding is not None:
            slides = is_layer_window_attention(
                config.window_size, config.window_attn_skip_freq, layer_number
            )
            self._kind = int(slides)
            if slides:
                config = copy.copy(config)
                config.yarn_mscale = of_sliding
        if config.attention_output_bias != config.add_bias_linear:
            # Megatron has one option for the biases here and in the MLP.
            config = copy.copy(config)
            config.add_bias_linear = config.attention_output_bias
        super().__init__(config, submodules, layer_number, **kwargs)
        if config.softmax_type == "learnable":
            mark_sinks(self.core_attention.softmax_offset)

    def forward(
        self,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends; leaves the rotation of packed sequences to `get_query_key_value_tensors`."""
        if self._kind is not None:
            assert rotary_pos_emb is not None
            rotary_pos_emb = rotary_pos_emb[self._kind]
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, HostPackedSeqParams)
            assert rotary_pos_emb is not None
            without = self.config.no_rope_freq
            if not (without and without[self.layer_number - 1]):
                # [longest, 1, 1, dim] --> [s, 1, 1, dim]
                self._frequencies = rotary_pos_emb[packed_seq_params.positions]
            rotary_pos_emb = None  # keeps Megatron from rotating again
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
        """Query [s, b, heads, dim], key and value [s, b, groups, dim], rotated if packed."""
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


class PackedSelfAttention(PackedRotation, SelfAttention):
    """Megatron's self-attention for packed sequences."""


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm for Megatron's local layer spec; also accepts [s/tp, b, h] slices.

    With Megatron's ``layernorm_zero_centered_gamma`` it multiplies with one more than its weight.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> None:
        super().__init__(
            hidden_size,
            eps=eps,
            device=torch.cuda.current_device(),
            dtype=config.params_dtype,
        )
        # With this mark Megatron sums the gradient over the tensor-parallel ranks, each of which
        # sees a slice.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension; multiplies with the weight, or with 1 + weight in fp32."""
        if not self._zero_centered:
            return super().forward(x)
        weight = 1.0 + self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


class ScaledDotProductAttention(MegatronModule):
    """Causal attention through torch, for right-padded or packed sequences, also in a window.

    No padding mask is needed: real tokens never see the padding after them, and outputs at padding
    are not used. Packed sequences are attended one by one, at their own lengths.
    """

    def __init__(
        self,
        config: RotaryTransformerConfig,
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
        self.softcap = config.score_softcap
        # Latest positions that a token attends to, itself included; None: all.
        self.window: int | None = None
        if is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        ):
            assert config.window_size is not None
            self.window = config.window_size[0] + 1
        self.tp_group = pg_collection.tp
        # The name is that of Megatron's own modules.
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(
                torch.empty(
                    config.num_attention_heads // self.tp_group.size(),
                    device=torch.cuda.current_device(),
                    dtype=config.params_dtype,
                )
            )

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
        """Attends: query [s, b, heads, dim], key and value [s, b, groups, dim] --> [s, b, h].

        Under context parallelism, s is this rank's share of the sequence. Packed tensors have no b.
        """
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, HostPackedSeqParams)
            lengths = packed_seq_params.lengths
            parts = zip(*(x.unsqueeze(1).split(lengths) for x in (query, key, value)), strict=True)
            return torch.cat([self._attend(*part) for part in parts]).squeeze(1)
        return self._attend(query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.cp_group.size() > 1:
            key, value, mask = self._gather(key, value)
            return self._attend_to(query, key, value, mask)
        length, window = query.shape[0], self.window
        if window is None or length <= window:
            return self._attend_to(query, key, value, None)
        # In blocks of one window's length, because a mask of [s, s] would grow with s squared. The
        # keys of a block begin at the first that its first token attends to.
        positions = torch.arange(length, device=query.device)
        parts = []
        for start in range(0, length, window):
            rows = slice(start, min(start + window, length))
            seen = slice(max(0, start - window + 1), rows.stop)
            mask = self._mask(positions[rows], positions[seen])
            parts.append(self._attend_to(query[rows], key[seen], value[seen], mask))
        return torch.cat(parts)

    def _attend_to(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attends where the mask [queries, keys] is true; without one to all earlier positions."""
        length, _, _, dim = query.shape
        sinks = self.softmax_offset
        if sinks is not None:
            scale = self.softmax_scale or dim**-0.5
            query, key, value, mask = with_sinks(query, key, value, mask, sinks, scale)
            return without_sinks(
                self._attend_over(query, key, value, mask, scale), length=length, dim=dim
            ).flatten(2)
        return self._attend_over(query, key, value, mask, self.softmax_scale).flatten(2)

    def _attend_over(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """Attention, torch's if scores have no softcap: query [s, b, heads, dim] --> the same."""
        if self.softcap is not None:
            return softcapped_attention(
                query, key, value, mask, scale=scale or query.shape[-1] ** -0.5, cap=self.softcap
            )
        # [s, b, n, d] --> [b, n, s, d]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        # The kernels that keep no [s, s] matrix want equal widths. Zeros change no score.
        width, widest = v.shape[-1], max(q.shape[-1], v.shape[-1])
        if width != q.shape[-1]:
            assert self.softmax_scale is not None  # it would be that of the widest otherwise
            q, k, v = (F.pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        # [b, n, s, d] --> [s, b, n, d]
        return out[..., :width].permute(2, 0, 1, 3)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sinks' entry in a checkpoint, split over the tensor-parallel ranks; {} without."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )

    def _mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether a token attends to another, by their positions: [queries, keys]."""
        behind = queries[:, None] - keys
        return behind >= 0 if self.window is None else (behind >= 0) & (behind < self.window)

    def _gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gathers keys and values over the context-parallel ranks; builds this rank's mask.

        [s/cp, b, groups, dim] --> [s, b, groups, dim], in the ranks' order; mask [s/cp, s].
        """
        size, rank = self.cp_group.size(), self.cp_group.rank()
        length = key.shape[0] * size
        # Each rank has two pieces of the sequence, so positions are not in order.
        positions = [
            context_parallel_positions(length, rank=r, size=size).to(key.device)
            for r in range(size)
        ]
        # The sequence-parallel gather works along dimension 0 of any group, with a backward pass.
        key, value = (
            gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value)
        )
        return key, value, self._mask(positions[rank], torch.cat(positions))


def layer_spec(*, qk_norm: bool, num_experts: int | None, transformer_engine: bool) -> ModuleSpec:
    """The spec of one layer.

    ``num_experts`` of None is a dense MLP. Local experts run one after the other, those of
    Transformer Engine in one grouped GEMM.
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
        # Transformer Engine does not fuse the norm before experts, so Megatron's checkpoints give
        # it its own name.
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
