"""`tests/training/test_layout` and `test_plan` have the checks of a run's settings."""

import dataclasses
from typing import Any

import pytest

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture, MixtureOfExperts, Rope
from megatron_oprd.models.layout_checks import check_layout
from megatron_oprd.parallel.layout import ParallelLayout

DENSE = Architecture(
    family="Qwen3ForCausalLM",
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=96,
    num_attention_heads=12,
    num_query_groups=3,
    head_dim=4,
    vocab_size=100,
    layernorm_epsilon=1e-6,
    rope=Rope(theta=1e4),
    tied=False,
    qkv_bias=False,
    qk_norm=True,
    max_position_embeddings=64,
)
EXPERTS = MixtureOfExperts(
    num_experts=8, num_experts_per_token=2, ffn_hidden_size=20, norm_topk_prob=True
)
MOE = dataclasses.replace(DENSE, moe=EXPERTS)


def check(architecture: Architecture, **sizes: Any) -> None:
    layout = {f"{name}_parallel_size": size for name, size in sizes.items()}
    check_layout(architecture, ParallelLayout(**layout), model="MODEL")


def test_layouts_that_fit() -> None:
    for tensor in (1, 3, 6, 12):  # with 6 and 12, several ranks have the same key/value head
        check(DENSE, tensor_model=tensor, pipeline_model=2)
    check(MOE, tensor_model=12, expert_model=4, expert_tensor=2)


@pytest.mark.parametrize(
    ("architecture", "sizes", "message"),
    [
        (DENSE, {"tensor_model": 5}, "--tensor-model-parallel-size 5 does not divide the 12 att"),
        (DENSE, {"tensor_model": 2}, "--tensor-model-parallel-size 2 neither divides the 3 key"),
        (
            dataclasses.replace(DENSE, ffn_hidden_size=100),
            {"tensor_model": 3},
            "--tensor-model-parallel-size 3 does not divide the 100 feed-forward width of MODEL",
        ),
        (MOE, {"tensor_model": 3}, "--expert-tensor-parallel-size 3 does not divide the 20 feed"),
        (MOE, {"expert_model": 3}, "--expert-model-parallel-size 3 does not divide the 8 experts"),
        (
            dataclasses.replace(MOE, mlp_bias=True),
            {"expert_tensor": 2},
            "--expert-tensor-parallel-size 2, but Megatron does not divide experts with biases over"
            " ranks, and those of MODEL have them; give --expert-tensor-parallel-size 1",
        ),
        (DENSE, {"expert_model": 2}, "--expert-model-parallel-size 2, but MODEL has no mixture of"),
        (DENSE, {"expert_tensor": 1}, "--expert-tensor-parallel-size 1, but MODEL has no mixture"),
    ],
)
def test_layouts_that_do_not(
    architecture: Architecture, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(architecture, **sizes)
