"""What a layout refuses, from architectures alone."""

import dataclasses
from pathlib import Path

import pytest

from megatron_oprd.config.load import load_config
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture, DeltaNet, Rope
from megatron_oprd.training.layout import RunLayout, make_layout

MODEL = Architecture(
    family="Phi3ForCausalLM",
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=96,
    num_attention_heads=12,
    num_query_groups=3,
    head_dim=4,
    vocab_size=97,
    layernorm_epsilon=1e-5,
    rope=Rope(
        theta=10000.0,
        rope_type="longrope",
        short_factor=(1.0, 1.0),
        long_factor=(2.0, 2.0),
        original_max_position_embeddings=64,
    ),
    tied=False,
    qkv_bias=False,
    qk_norm=False,
    max_position_embeddings=256,
)


def config(tmp_path: Path, *overrides: str) -> RunConfig:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        "output_dir: run\nmodel: {student: s, teacher: t}\ndata: {prompts: [p], "
        "max_prompt_tokens: 32}\nrollout: {max_new_tokens: 32}\n"
    )
    return load_config(run_file, list(overrides))


def layout(found: RunConfig, model: Architecture = MODEL, world_size: int = 1) -> RunLayout:
    return make_layout(found, student=model, teacher=model, world_size=world_size)


@pytest.mark.parametrize(("tp", "groups"), [(1, 3), (3, 3), (6, 3), (12, 3), (4, 12), (2, 4)])
def test_heads_that_divide(tmp_path: Path, tp: int, groups: int) -> None:
    """Key/value heads are dealt out, or, where there are fewer than ranks, each is on several."""
    found = config(tmp_path, f"parallel.tensor_model_parallel_size={tp}")
    layout(found, dataclasses.replace(MODEL, num_query_groups=groups), world_size=tp)


@pytest.mark.parametrize(
    ("tp", "groups", "message"),
    [
        (2, 3, "2 neither divides the 3 key/value heads of model.student nor is a multiple"),
        (6, 4, "6 neither divides the 4 key/value heads"),
        (8, 3, "8 does not divide the 12 attention heads"),
    ],
)
def test_heads_that_do_not_divide(tmp_path: Path, tp: int, groups: int, message: str) -> None:
    found = config(tmp_path, f"parallel.tensor_model_parallel_size={tp}")
    with pytest.raises(UserError, match=message):
        layout(found, dataclasses.replace(MODEL, num_query_groups=groups), world_size=tp)


LINEAR = dataclasses.replace(
    MODEL,
    num_query_groups=12,
    delta=DeltaNet(num_key_heads=4, values_per_key=2, key_dim=4, value_dim=4, kernel_size=4),
    delta_layers=(True, True, True, False),
)


def test_linear_attention_divides_its_key_heads(tmp_path: Path) -> None:
    layout(config(tmp_path, "parallel.tensor_model_parallel_size=2"), LINEAR, world_size=2)
    found = config(tmp_path, "parallel.tensor_model_parallel_size=3")
    with pytest.raises(UserError, match=r"= 3 does not divide the 4 key heads of model\.student"):
        layout(found, LINEAR, world_size=3)


def test_linear_attention_refuses_context_parallelism(tmp_path: Path) -> None:
    found = config(tmp_path, "parallel.context_parallel_size=2")
    with pytest.raises(
        UserError, match=r"context_parallel_size = 2, but model\.student has linear"
    ):
        layout(found, LINEAR, world_size=2)


def test_an_engine_that_is_split_otherwise_than_heads(tmp_path: Path) -> None:
    pp8 = "parallel.pipeline_model_parallel_size=8"
    engine = "rollout.vllm.tensor_model_parallel_size"
    model = dataclasses.replace(MODEL, num_layers=8)
    for size in (3, 6):
        found = config(
            tmp_path,
            *(pp8, "rollout.engine=vllm", f"{engine}={size}", "rollout.prompts_per_step=9"),
        )
        layout(found, model, 24)
        with pytest.raises(UserError, match=rf"{engine} = {size}: .* to divide the 8 processes"):
            layout(found, model, 8)
    for size in (2, 8):
        found = config(tmp_path, "rollout.engine=vllm", pp8, f"{engine}={size}")
        with pytest.raises(UserError, match=rf"rollout\.vllm\.tensor_.* = {size} .* heads of mod"):
            layout(found, model, 16)


def test_longrope_that_would_switch_within_a_rollout(tmp_path: Path) -> None:
    assert layout(config(tmp_path)).max_sequence_length == 64
    with pytest.raises(UserError, match=r"up to 65 tokens; model\.student changes .* past 64"):
        layout(config(tmp_path, "rollout.max_new_tokens=33"))
