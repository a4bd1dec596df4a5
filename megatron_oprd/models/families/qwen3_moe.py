"""Qwen3 with a mixture of experts in every layer, as in Qwen3-30B-A3B.

Differs from Qwen3 in the router and the experts. transformers 4 writes ``num_experts``,
transformers 5 ``num_local_experts``; in both the checkpoint's tensors are one for each expert.
"""

from typing import Any

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import MixtureOfExperts
from megatron_oprd.models.families.decoder import Family


def _mixture_of_experts(hf_config: Any, source: str) -> MixtureOfExperts:
    experts, chosen = hf_config.num_experts, hf_config.num_experts_per_tok
    if experts is None or chosen is None:
        raise UserError(
            f"{source}: num_experts = {experts} with num_experts_per_tok = {chosen}; both have to "
            "be numbers (a null num_local_experts counts before num_experts: remove it)"
        )
    if not 1 <= chosen <= experts:
        raise UserError(
            f"{source}: num_experts_per_tok = {chosen} with {experts} experts (num_experts or "
            "num_local_experts)"
        )
    if chosen == 1 and hf_config.norm_topk_prob:
        raise UserError(
            f"{source}: norm_topk_prob = true with num_experts_per_tok = 1 makes every "
            "probability 1, and the router would not train; it is not supported"
        )
    return MixtureOfExperts(
        num_experts=experts,
        num_experts_per_token=chosen,
        ffn_hidden_size=hf_config.moe_intermediate_size,
        norm_topk_prob=hf_config.norm_topk_prob,
    )


FAMILY = Family(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    qk_norm=True,
    moe=_mixture_of_experts,
    required={
        "attention_bias": lambda value: not value,
        "use_sliding_window": lambda value: not value,
        "sliding_window": lambda value: True,  # has no effect while use_sliding_window is off
        # Some layers with a dense MLP.
        "decoder_sparse_step": lambda value: value == 1,
        "mlp_only_layers": lambda value: not value,
        # For the load-balancing loss, which distillation does not have.
        "output_router_logits": lambda value: True,
        "router_aux_loss_coef": lambda value: True,
        **dict.fromkeys(
            (
                "moe_intermediate_size",
                "norm_topk_prob",
                "num_experts",
                "num_experts_per_tok",
                "num_local_experts",
            ),
            lambda value: True,
        ),
    },
)
