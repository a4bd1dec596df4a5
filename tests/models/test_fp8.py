"""A teacher with FP8 weights against transformers' model with the same rounded weights."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_tools.hidden_states import transformers_states
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import copy_with_config, save_tiny_model, tiny_config

SEQUENCES = [[0, 96, 5, 17, 60, 33, 8, 21], [44, 3, 90, 12]]
TP2, TP4 = {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 4}
SP, PP2 = {"sequence_parallel": True}, {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
# No width is a multiple of 128; blocks end inside the ranks' shares.
WIDE = {"hidden_size": 160, "num_attention_heads": 8, "num_key_value_heads": 4}
TIED = {"tie_word_embeddings": True, "num_hidden_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {**WIDE, **TIED, "intermediate_size": 288}),
    "moe": ("qwen3_moe", {**WIDE, **TIED, "moe_intermediate_size": 136, "head_dim": 20}),
    # Much deeper than wide, to tell one weight from all of them.
    "deep": ("llama", {"hidden_size": 64, "num_hidden_layers": 12, "tie_word_embeddings": True}),
}
RECIPES = ("per_channel_log", "per_channel", "block_128")
ON_RANKS = ("per_channel_log", "block_128")  # scales by channel are found alike
# (model, layout): (ranks, parallel settings)
LAYOUTS: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {
    ("qwen2", "tp2"): (2, TP2),
    ("qwen2", "tp2_sp"): (2, TP2 | SP),
    ("qwen2", "pp2"): (2, PP2),
    ("qwen2", "tp4_sp"): (4, TP4 | SP),
    ("moe", "ep2"): (2, EP2),
    ("moe", "tp2_sp"): (2, TP2 | SP),
    ("moe", "tp2_sp_ep2"): (4, TP2 | SP | EP2),
}
FP8 = {"precision": "fp8"}
# name: (model, teacher's settings, format)
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "unquantised": ("deep", {}, "fp32"),
    "fp8": ("deep", FP8, "fp32"),
    "fp8_bf16": ("deep", FP8, "bf16"),
    "ends_in_bf16": (
        "deep",
        FP8 | {"num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 1},
        "fp32",
    ),
    "no_transformer_engine": ("deep", FP8 | {"fp8_recipe": "blockwise"}, "bf16"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the models and the results of every case."""
    root = tmp_path_factory.mktemp("fp8")
    for number, (model, (family, fields)) in enumerate(MODELS.items()):
        save_tiny_model(root / model, tiny_config(family, **fields), seed=number)

    def case(name: str, model: str, teacher: dict[str, Any], **settings: Any) -> dict[str, Any]:
        return {
            "name": name,
            "folder": str(root / model),
            "teacher": teacher,
            "parallel": {},
            "params_dtype": "fp32",
            "sequences": SEQUENCES,
            "pretend": False,
        } | settings

    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    for name, (model, teacher, dtype) in OTHERS.items():
        cases[1].append(case(name, model, teacher, params_dtype=dtype))
    teacher = FP8 | {"fp8_recipe": "blockwise", "num_layers_at_start_in_bf16": 1}
    cases[1].append(case("silently_bf16", "deep", teacher, params_dtype="bf16", pretend=True))
    for recipe in RECIPES:
        teacher = FP8 | {"fp8_recipe": recipe}
        for model in ("qwen2", "moe"):
            cases[1].append(case(f"{model}.one.{recipe}", model, teacher))
        if recipe not in ON_RANKS:
            continue
        for (model, layout), (ranks, parallel) in LAYOUTS.items():
            name = f"{model}.{layout}.{recipe}"
            cases[ranks].append(case(name, model, teacher, parallel=parallel))
    for ranks, of_ranks in cases.items():
        run_ranks("fp8", of_ranks, ranks, root)
    return root


def rounded(tensor: Tensor, recipe: str) -> Tensor:
    """What a Hugging Face tensor is in FP8, worked out block by block."""
    rows, columns = tensor.shape
    height, width = (128, 128) if recipe == "block_128" else (1, columns)
    out = torch.empty_like(tensor)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            index = (slice(row, row + height), slice(column, column + width))
            block, eps = tensor[index], 1 / 8
            if recipe == "per_channel_log":
                scale = block.abs().max() / math.log1p(448 / eps)
                stored = (eps * torch.expm1(block.abs() / scale)).to(torch.float8_e4m3fn)
                out[index] = block.sign() * scale * torch.log1p(stored.float() / eps)
            else:
                scale = block.abs().max() / 448
                out[index] = (block / scale).to(torch.float8_e4m3fn).float() * scale
    return out


@pytest.fixture(scope="module")
def expected(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Tensor]]]:
    """transformers' hidden states by model and recipe; without a recipe those not rounded."""
    found = {}
    folder = tmp_path_factory.mktemp("rounded")
    for model in ("qwen2", "moe"):
        for recipe in (*RECIPES, None):
            copy = copy_with_config(root / model, folder / f"{model}.{recipe}")
            file = copy / "model.safetensors"
            tensors = load_file(file)
            if recipe is not None:
                tensors = {
                    name: rounded(t, recipe) if name.endswith("_proj.weight") else t.clone()
                    for name, t in tensors.items()
                }
                save_file(tensors, file, metadata={"format": "pt"})
            states = transformers_states(copy, SEQUENCES, device=torch.device("cpu"))
            found[f"{model}.{recipe}"] = [*states.layers, states.normed]
    return found


def errors(found: list[list[Tensor]], expected: list[list[Tensor]]) -> list[float]:
    """|difference| / |expected| of each layer and of the final norm."""
    pairs = [(torch.cat(a), torch.cat(b)) for a, b in zip(found, expected, strict=True)]
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


def result(root: Path, name: str) -> dict[str, Any]:
    return torch.load(root / f"{name}.pt")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", ["qwen2", "moe"])
def test_equals_transformers_with_rounded_weights(
    root: Path, expected: dict[str, list[list[Tensor]]], model: str, recipe: str
) -> None:
    found = result(root, f"{model}.one.{recipe}")["states"]
    # A number that is rounded the other way is off by a step.
    assert max(errors(found, expected[f"{model}.{recipe}"])) < 3e-4
    moved = errors(found, expected[f"{model}.None"])
    assert min(moved) > (3e-3 if recipe == "per_channel_log" else 1e-2), moved


@pytest.mark.parametrize("recipe", ON_RANKS)
@pytest.mark.parametrize(("model", "layout"), LAYOUTS)
def test_layout_changes_nothing(root: Path, model: str, layout: str, recipe: str) -> None:
    one = result(root, f"{model}.one.{recipe}")["states"]
    assert max(errors(result(root, f"{model}.{layout}.{recipe}")["states"], one)) < 1e-4


def test_linear_weights_and_nothing_else_are_fp8(root: Path) -> None:
    for model in ("qwen2", "moe"):
        found = result(root, f"{model}.one.per_channel_log")
        fp8 = {n for n, (dtype, _) in found["parameters"].items() if dtype == "torch.float8_e4m3fn"}
        linear = {n for n in found["parameters"] if ".linear_" in n and n.endswith(".weight")}
        assert fp8 == linear
        assert len(fp8) == (2 * 4 if model == "qwen2" else 2 * (2 + 2 * 8))
        assert not found["requires_grad"]


def test_bytes(root: Path) -> None:
    """A byte a weight, and 4 for each output channel of each Hugging Face tensor."""
    found = result(root, "fp8_bf16")
    weights = channels = others = 0
    for name, tensor in load_file(root / "deep" / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            weights += tensor.numel()
            channels += tensor.shape[0]
        elif "embed" not in name:
            others += tensor.numel()
    assert found["bytes"] == weights + 4 * channels + 2 * (others + 128 * 64)


def test_first_and_last_layers_in_bf16(root: Path) -> None:
    parameters = result(root, "ends_in_bf16")["parameters"]
    fp8 = {name for name, (dtype, _) in parameters.items() if dtype == "torch.float8_e4m3fn"}
    assert {int(name.split(".")[2]) for name in fp8} == set(range(2, 11))
    states = result(root, "ends_in_bf16")["states"]
    unquantised = result(root, "unquantised")["states"]
    moved = errors(states, unquantised)
    assert max(moved[:2]) < 1e-6
    assert min(moved[2:]) > 1e-3


@pytest.mark.parametrize("name", ["fp8", "fp8_bf16"])
def test_loading_never_holds_the_unquantised_model(root: Path, name: str) -> None:
    found = result(root, name)
    itemsize = 2 if name == "fp8_bf16" else 4
    sizes = {
        parameter: numel for parameter, (_, numel) in found["parameters"].items()
        if ".linear_" in parameter and parameter.endswith(".weight")
    }  # fmt: skip
    # Beside the FP8 model there are one weight as it is read, and fp32 copies of it.
    over = found["peak"] - found["bytes"]
    assert over < 7 * 4 * max(sizes.values())
    assert over < 0.5 * itemsize * sum(sizes.values())
    unquantised = result(root, "unquantised")
    assert unquantised["peak"] >= 4 * sum(sizes.values()), "the measure sees what is allocated"


def test_a_recipe_that_is_not_here_is_refused_before_weights_are_read(root: Path) -> None:
    found = result(root, "no_transformer_engine")
    assert "teacher.fp8_recipe = blockwise is not available here" in found["error"]
    assert "per_channel_log" in found["error"]
    assert found["reads"] == []
    assert result(root, "fp8")["reads"] != []


def test_a_model_that_megatron_silently_builds_in_bf16_is_refused(root: Path) -> None:
    """megatron-core takes its FP8 settings without Transformer Engine, and does nothing."""
    found = result(root, "silently_bf16")
    assert "built decoder.layers.1." in found["error"], "layer 0 is to be bf16"
    assert "bfloat16" in found["error"]
    assert found["reads"] == []
