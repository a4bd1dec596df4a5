"""FP8 with Transformer Engine, as far as plain numbers go."""

import dataclasses
import sys
from types import ModuleType
from typing import get_args

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_oprd.config.schema import FP8Recipe, ModelConfig, ParallelConfig, TeacherConfig
from megatron_oprd.errors import UserError
from megatron_oprd.models import fp8_transformer_engine as te_fp8
from megatron_oprd.models.architecture import Architecture, MixtureOfExperts, Rope
from megatron_oprd.models.fp8_codes import FORMATS
from megatron_oprd.models.teacher import check_precision, layers_in_fp8, token_multiple

QWEN3_32B = Architecture(
    family="Qwen3ForCausalLM",
    num_layers=64,
    hidden_size=5120,
    ffn_hidden_size=25600,
    num_attention_heads=64,
    num_query_groups=8,
    head_dim=128,
    vocab_size=151936,
    layernorm_epsilon=1e-6,
    rope=Rope(theta=1e6),
    tied=False,
    qkv_bias=False,
    qk_norm=True,
    max_position_embeddings=40960,
)
BLOCKWISE = TeacherConfig(precision="fp8", fp8_recipe="blockwise")


def check(
    teacher: TeacherConfig,
    architecture: Architecture = QWEN3_32B,
    *,
    params_dtype: str = "bf16",
    tp: int = 1,
    pp: int = 1,
) -> None:
    check_precision(
        teacher,
        architecture,
        model=ModelConfig(params_dtype=params_dtype),  # type: ignore[arg-type]
        parallel=ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp),
        num_layers=architecture.num_layers,
    )


def test_every_recipe_is_one_or_the_other() -> None:
    assert {*FORMATS, *te_fp8.RECIPES, "delayed"} == set(get_args(FP8Recipe))
    assert not FORMATS.keys() & te_fp8.RECIPES.keys()


def test_options_are_fields_of_megatrons_configuration() -> None:
    fields = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    teacher = dataclasses.replace(BLOCKWISE, num_layers_at_end_in_bf16=2)
    options = te_fp8.fp8_options(teacher)
    assert options.keys() <= fields.keys()
    assert options["first_last_layers_bf16"]
    assert (options["num_layers_at_start_in_bf16"], options["num_layers_at_end_in_bf16"]) == (0, 2)
    assert not te_fp8.fp8_options(BLOCKWISE)["first_last_layers_bf16"]
    for recipe in te_fp8.RECIPES:
        assert recipe in str(fields["fp8_recipe"].type)


@pytest.mark.parametrize("recipe", te_fp8.RECIPES)
def test_availability_is_asked_of_transformer_engine(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    engine = ModuleType("transformer_engine.pytorch")
    for name in te_fp8.RECIPES.values():

        def answer(return_reason: bool = False, *, name: str = name) -> tuple[bool, str]:
            assert return_reason
            asked.append(name)
            return recipe != "mxfp8", "needs compute capability 10.0"

        setattr(engine, name, answer)
    package = ModuleType("transformer_engine")
    package.pytorch = engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    if recipe == "mxfp8":
        with pytest.raises(UserError, match=r"mxfp8 is not available here: needs compute cap"):
            te_fp8.check_available(recipe, transformer_engine=True)
    else:
        te_fp8.check_available(recipe, transformer_engine=True)
    assert asked == [te_fp8.RECIPES[recipe]]
    with pytest.raises(UserError, match=f"fp8_recipe = {recipe} .* no CUDA device"):
        te_fp8.check_available(recipe, transformer_engine=False)


def test_a_32b_teacher_fits() -> None:
    for recipe in get_args(FP8Recipe):
        if recipe != "delayed":
            check(TeacherConfig(precision="fp8", fp8_recipe=recipe), tp=8, pp=4)


@pytest.mark.parametrize(
    ("recipe", "changes", "tp", "message"),
    [
        ("blockwise", {"hidden_size": 5128}, 1, "hidden_size .* is 5128"),
        ("mxfp8", {"hidden_size": 5136}, 1, "hidden_size .* is 5136"),
        ("tensorwise", {"ffn_hidden_size": 25600 + 64}, 8, "width on each rank .* is 3208"),
        ("tensorwise", {"head_dim": 8, "num_attention_heads": 8}, 8, r"heads' width .* is 8;"),
        ("blockwise", {"moe": (64, 1000)}, 1, r"each expert's feed-forward width .* is 1000"),
    ],
)
def test_shapes(recipe: str, changes: dict, tp: int, message: str) -> None:
    if "moe" in changes:
        experts, width = changes["moe"]
        moe = MixtureOfExperts(
            num_experts=experts,
            num_experts_per_token=8,
            ffn_hidden_size=width,
            norm_topk_prob=True,
        )
        changes = {"moe": moe}
    architecture = dataclasses.replace(QWEN3_32B, **changes)
    teacher = TeacherConfig(precision="fp8", fp8_recipe=recipe)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        check(teacher, architecture, tp=tp)
    check(TeacherConfig(precision="fp8"), architecture, tp=tp)


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({}, {"params_dtype": "fp32"}, r"needs model\.params_dtype = bf16 \(found fp32\)"),
        ({"offload": "cpu"}, {}, r"teacher\.offload = none \(found cpu\)"),
        ({"num_layers_at_end_in_bf16": 17}, {"pp": 4}, r"allows at most 16 each"),
        (
            {"num_layers_at_start_in_bf16": 60, "num_layers_at_end_in_bf16": 4},
            {},
            r"leave no layer .* 64 layers",
        ),
    ],
)
def test_combinations(fields: dict, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(dataclasses.replace(BLOCKWISE, **fields), **settings)
    local = dataclasses.replace(BLOCKWISE, fp8_recipe="per_channel", **fields)
    if "leave no layer" in message:
        with pytest.raises(UserError, match=message):
            check(local, **settings)
    else:
        check(local, **settings)


def test_layers_in_fp8() -> None:
    teacher = TeacherConfig(
        precision="fp8", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=2
    )
    assert layers_in_fp8(teacher, 8) == range(1, 6)
    assert layers_in_fp8(TeacherConfig(), 8) == range(0)


@pytest.mark.parametrize(
    ("teacher", "sequence_parallel", "expected"),
    [
        (TeacherConfig(), True, 1),
        (TeacherConfig(precision="fp8"), True, 1),
        (TeacherConfig(precision="fp8", fp8_recipe="tensorwise"), True, 16),
        (TeacherConfig(precision="fp8", fp8_recipe="mxfp8"), True, 32),
        (BLOCKWISE, False, 16),
        (BLOCKWISE, True, 128),
    ],
)
def test_tokens_of_a_micro_batch(
    teacher: TeacherConfig, sequence_parallel: bool, expected: int
) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    assert token_multiple(teacher, parallel) == expected
