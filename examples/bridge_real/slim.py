"""A narrower Llama: fewer channels, heads and feed-forward channels, the most used ones kept.

What is used is measured on texts:

- a channel of the residual stream by its mean square at the input of a layer, divided by that of
  all channels there, summed over the layers;
- a key/value head, with its query heads, by the mean square of what its query heads add to the
  residual stream: attention output times the norm of the output projection's columns;
- a feed-forward channel likewise, by activation and the norm of the down projection's column.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the narrower model.

    Attributes:
        hidden_size: Channels of the residual stream.
        key_value_heads: Key/value heads of a layer; each keeps its query heads.
        intermediate_size: Feed-forward channels of a layer.
    """

    hidden_size: int
    key_value_heads: int
    intermediate_size: int


def slim(model: LlamaForCausalLM, texts: Sequence[Sequence[int]], sizes: Sizes) -> LlamaForCausalLM:
    """The narrower model; every number in it is one of the model's.

    Args:
        model: With tied embeddings, in evaluation mode.
        texts: Token ids of texts, on which use is measured.
        sizes: At most the model's own.
    """
    config = model.config
    channels, heads, inner = _used(model, texts)
    keep = _largest(channels, sizes.hidden_size)
    group = config.num_attention_heads // config.num_key_value_heads
    fields = config.to_dict() | {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_key_value_heads": sizes.key_value_heads,
        "num_attention_heads": sizes.key_value_heads * group,
    }
    narrow = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    copied = {
        "model.embed_tokens.weight": model.model.embed_tokens.weight[:, keep],
        "model.norm.weight": model.model.norm.weight[keep],
    }
    for number, layer in enumerate(model.model.layers):
        kept_heads = _largest(heads[number], sizes.key_value_heads)
        keys = _rows_of(kept_heads, config.head_dim)
        queries = _rows_of(kept_heads, config.head_dim * group)
        ffn = _largest(inner[number], sizes.intermediate_size)
        attention, mlp = layer.self_attn, layer.mlp
        of_layer = {
            "input_layernorm": layer.input_layernorm.weight[keep],
            "post_attention_layernorm": layer.post_attention_layernorm.weight[keep],
            "self_attn.q_proj": attention.q_proj.weight[queries][:, keep],
            "self_attn.k_proj": attention.k_proj.weight[keys][:, keep],
            "self_attn.v_proj": attention.v_proj.weight[keys][:, keep],
            "self_attn.o_proj": attention.o_proj.weight[keep][:, queries],
            "mlp.gate_proj": mlp.gate_proj.weight[ffn][:, keep],
            "mlp.up_proj": mlp.up_proj.weight[ffn][:, keep],
            "mlp.down_proj": mlp.down_proj.weight[keep][:, ffn],
        }
        copied |= {f"model.layers.{number}.{name}.weight": t for name, t in of_layer.items()}
    copied["lm_head.weight"] = copied["model.embed_tokens.weight"]
    narrow.load_state_dict(copied)
    narrow.generation_config = model.generation_config
    return narrow


@torch.no_grad()
def _used(
    model: LlamaForCausalLM, texts: Sequence[Sequence[int]]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Use of the residual channels [d], and by layer of key/value heads and inner channels."""
    layers = model.model.layers
    squares: dict[nn.Module, Tensor] = {}

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares[module] = squares.get(module, 0) + inputs[0].square().sum(dim=(0, 1))

    watched = [m for one in layers for m in (one, one.self_attn.o_proj, one.mlp.down_proj)]
    hooks = [module.register_forward_pre_hook(add) for module in watched]
    for text in texts:
        model(torch.tensor([list(text)]), logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    channels = torch.stack([squares[one] / squares[one].sum() for one in layers]).sum(dim=0)

    def added(projection: nn.Linear) -> Tensor:
        return squares[projection] * projection.weight.square().sum(dim=0)

    num_heads = model.config.num_key_value_heads
    heads = [added(one.self_attn.o_proj).view(num_heads, -1).sum(dim=1) for one in layers]
    return channels, heads, [added(one.mlp.down_proj) for one in layers]


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values, ascending."""
    return values.topk(count).indices.sort().values


def _rows_of(heads: Tensor, rows: int) -> Tensor:
    return torch.cat([torch.arange(head * rows, (head + 1) * rows) for head in heads.tolist()])
