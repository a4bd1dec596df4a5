"""What lies past the deepest tap is frozen and does not run; the teacher has none of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.closeness import assert_close_relative
from tests.helpers.pairs import LINEAR_UPDATES, save_pair
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow

PAIRS: dict[str, dict[str, Any]] = {
    "untied": {"family": "llama", "teacher_layers": 7},
    "tied": {"family": "qwen3", "tied": True},
}
TWO_LAYERS = "taps.layers=[0,1]"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
FULL = [
    "batch.micro_batch_size=2",
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=uniform",
    "recompute.recompute_num_layers=1",
]
# name: (overrides, student layers that run, whether the final norm trains)
METHODS: dict[str, tuple[list[str], int, bool]] = {
    "all": ([], 4, True),
    "pre_norm": (["taps.last_layer=pre_norm"], 4, False),
    "two_layers": ([TWO_LAYERS], 2, False),
    "one_layer": (["taps.layers=[0]"], 1, False),
}
# (method, layout): (ranks, overrides)
LAYOUTS: dict[tuple[str, str], tuple[int, list[str]]] = {
    # Frozen layers end the second stage; with virtual stages they are chunks of their own.
    ("two_layers", "pp2"): (2, [PP2]),
    ("two_layers", "pp2_overlap"): (2, [PP2, "optimizer.overlap_grad_reduce=true"]),
    ("two_layers", "pp2_full_recompute"): (2, [PP2, *FULL]),
    ("two_layers", "pp2_vpp2"): (2, [PP2, VPP2]),
    ("two_layers", "pp2_vpp2_full_recompute"): (2, [PP2, VPP2, *FULL]),
    ("two_layers", "dp2_overlap"): (2, ["optimizer.overlap_grad_reduce=true"]),
    ("two_layers", "tp2_sp"): (
        2,
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    ),
}
# Teacher layers that are built: up to the deepest mapped one.
TEACHER_LAYERS = {
    "untied": {"all": 7, "pre_norm": 7, "two_layers": 3, "one_layer": 1},
    "tied": {"all": 4, "pre_norm": 4, "two_layers": 2, "one_layer": 1},
}
CASES = [(method, "one") for method in METHODS] + list(LAYOUTS)
EACH_CASE = pytest.mark.parametrize(("method", "layout"), CASES)
EACH_PAIR = pytest.mark.parametrize("pair", PAIRS)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of every case."""
    root = tmp_path_factory.mktemp("frozen")
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for pair, settings in PAIRS.items():
        folder = str(save_pair(root / pair, **settings))
        for method, layout in CASES:
            ranks, overrides = LAYOUTS.get((method, layout), (1, []))
            cases[ranks].append(
                {
                    "name": f"{pair}.{method}.{layout}",
                    "pair": folder,
                    "overrides": [*LINEAR_UPDATES, *METHODS[method][0], *overrides],
                }
            )
    for ranks, of_ranks in cases.items():
        run_ranks("frozen", of_ranks, ranks, root)
    return root


def _layer(name: str) -> int | None:
    """The layer that a Megatron or Hugging Face parameter belongs to."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _trains(name: str, method: str) -> bool:
    """Whether a parameter, by its Megatron or Hugging Face name, should train."""
    _, num_running, norm_trains = METHODS[method]
    layer = _layer(name)
    if layer is not None:
        return layer < num_running
    if name in ("decoder.final_layernorm.weight", "model.norm.weight"):
        return norm_trains
    return name in ("embedding.word_embeddings.weight", "model.embed_tokens.weight")


@EACH_CASE
@EACH_PAIR
def test_only_layers_up_to_the_deepest_tap_run(
    results: Path, pair: str, method: str, layout: str
) -> None:
    ran = torch.load(results / f"{pair}.{method}.{layout}.pt")["ran"]["student"]
    assert {_layer(name) for name in ran} == set(range(METHODS[method][1]))
    assert "output_layer" not in ran
    assert {"0.self_attention", "0.mlp"} <= ran


@EACH_CASE
@EACH_PAIR
def test_the_rest_is_frozen(results: Path, pair: str, method: str, layout: str) -> None:
    found = torch.load(results / f"{pair}.{method}.{layout}.pt")
    parameters = found["parameters"]["student"]
    assert {_layer(name) for name in parameters} == {None, 0, 1, 2, 3}
    assert ("output_layer.weight" in parameters) == (pair == "untied")
    for name, facts in parameters.items():
        trains = _trains(name, method)
        assert facts == {"requires_grad": trains, "has_gradient": trains}, name


@EACH_CASE
@EACH_PAIR
def test_the_rest_keeps_its_values_bit_for_bit(
    results: Path, pair: str, method: str, layout: str
) -> None:
    found = torch.load(results / f"{pair}.{method}.{layout}.pt")
    assert len(found["before"]) == len(found["after"]) > 30
    for name, before in found["before"].items():
        # A tied embedding trains as well, from its input side.
        assert torch.equal(found["after"][name], before) != _trains(name, method), name


@EACH_CASE
@EACH_PAIR
def test_the_teacher_is_cut_and_frozen(results: Path, pair: str, method: str, layout: str) -> None:
    found = torch.load(results / f"{pair}.{method}.{layout}.pt")
    parameters, depth = found["parameters"]["teacher"], TEACHER_LAYERS[pair][method]
    assert {_layer(name) for name in parameters} == {None, *range(depth)}
    others = {name for name in parameters if _layer(name) is None}
    final_norm = {"decoder.final_layernorm.weight"} if METHODS[method][2] else set()
    assert others == {"embedding.word_embeddings.weight"} | final_norm
    for name, facts in parameters.items():
        assert facts == {"requires_grad": False, "has_gradient": False}, name
    assert {_layer(name) for name in found["ran"]["teacher"]} == set(range(depth))


@pytest.mark.parametrize(("method", "layout"), LAYOUTS)
@EACH_PAIR
def test_a_layout_with_frozen_layers_changes_nothing(
    results: Path, pair: str, method: str, layout: str
) -> None:
    found = torch.load(results / f"{pair}.{method}.{layout}.pt")
    expected = torch.load(results / f"{pair}.{method}.one.pt")
    for name in ("loss", "cosine", "grad_norm"):
        size = 1.0 if name == "cosine" else None
        assert_close_relative(found[name], expected[name], 1e-5, size=size, what=name)
    for name, weight in expected["after"].items():
        assert_close_relative(found["after"][name], weight, 1e-5, what=name)
