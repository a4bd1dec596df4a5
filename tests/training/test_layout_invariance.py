"""The main test: no layout changes what a step computes, up to rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pairs import save_pair
from tests.ranks import run_ranks

TP2 = "parallel.tensor_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
PP2 = "parallel.pipeline_model_parallel_size=2"
PP4 = "parallel.pipeline_model_parallel_size=4"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
MBS1 = "batch.micro_batch_size=1"
MBS2 = "batch.micro_batch_size=2"
SELECTIVE = ["recompute.recompute_granularity=selective"]
FULL = [
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=uniform",
    "recompute.recompute_num_layers=1",
]
FULL_BLOCK = [
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=block",
    "recompute.recompute_num_layers=1",
]
# The distributed optimizer leaves each rank with its own part of the gradients.
WHOLE_GRADIENTS = "optimizer.use_distributed_optimizer=false"

# name: (ranks, overrides, whether gradients are whole on every rank)
LAYOUTS: dict[str, tuple[int, list[str], bool]] = {
    "mbs1": (1, [MBS1], True),
    "token_budget": (1, ["batch.max_tokens=40"], True),
    "selective": (1, [MBS2, *SELECTIVE], True),
    "full": (1, [MBS2, *FULL], True),
    "full_of_two_layers": (1, [MBS2, *FULL[:2], "recompute.recompute_num_layers=2"], True),
    "tp2": (2, [TP2], True),
    "tp2_sp": (2, [TP2, SP, MBS2], True),
    "tp2_sp_full": (2, [TP2, SP, MBS2, *FULL], True),
    "pp2": (2, [PP2, MBS2], True),
    "pp2_selective": (2, [PP2, MBS2, *SELECTIVE], True),
    "pp2_full": (2, [PP2, MBS1, *FULL], True),
    "pp2_full_block": (2, [PP2, MBS1, *FULL_BLOCK], True),
    "pp2_uneven": (2, [PP2, MBS2, "parallel.num_layers_per_stage=[1,3]"], True),
    "pp2_vpp2": (2, [PP2, VPP2, MBS2], True),
    "pp2_vpp2_full": (2, [PP2, VPP2, MBS1, *FULL], True),
    "dp2": (2, [MBS2, WHOLE_GRADIENTS], True),
    "dp2_distributed_optimizer": (2, [MBS2], False),
    "pp4": (4, [PP4, MBS2], True),
    "tp2_pp2": (4, [TP2, PP2, MBS2], True),
    "tp2_sp_pp2_full": (4, [TP2, SP, PP2, MBS1, *FULL], True),
    "dp2_pp2": (4, [PP2, MBS1, WHOLE_GRADIENTS], True),
    "dp2_pp2_overlap": (4, [PP2, MBS1, "optimizer.overlap_grad_reduce=true"], False),
    "dp2_tp2_sp": (4, [TP2, SP, MBS2], False),
}
PAIRS = {
    "llama_equal": {"family": "llama"},
    "llama_tied_deeper": {"family": "llama", "teacher_layers": 7, "tied": True},
    "qwen3_equal": {"family": "qwen3", "tied": True},
    "qwen3_deeper": {"family": "qwen3", "teacher_layers": 7},
}
# Two student layers share a teacher layer, so not every stage can end where it likes.
SHALLOWER = {"llama_shallower": {"family": "llama", "teacher_layers": 3}}
# Updates that are large against the tolerance, and about linear in the gradient: Adam turns the
# rounding of a tiny gradient into a step of the same size as any other.
UPDATE = ["optimizer.lr=0.1", "optimizer.adam_eps=1.0", "optimizer.lr_warmup_fraction=0"]
# Settings of the method, each with its own single-process reference.
METHODS: dict[str, list[str]] = {
    "default": [],
    "even_last_k_sequence_mean": [
        "taps.layers=even",
        "taps.positions=last_k",
        "taps.k=3",
        "loss.aggregation=sequence_mean",
        "loss.normalize=l2",
        "loss.coefficient=100",
    ],
    # The teacher's last layer, and its final norm, sit on a stage that is not the last.
    "last_teacher_layer_early": ["taps.layers=[0,2]", "taps.layer_map=[1,3]"],
    "predictor_pre_norm": ["taps.alignment=predictor", "taps.last_layer=pre_norm"],
}
# Every layout with the default method, and the layouts that differ most with the others.
COMBINATIONS = [("default", layout) for layout in LAYOUTS] + [
    (method, layout)
    for method in METHODS
    if method not in ("default", "last_teacher_layer_early")
    for layout in ("tp2_sp_full", "pp2_vpp2", "tp2_sp_pp2_full", "dp2_pp2")
]
EARLY = "last_teacher_layer_early"
CASES = [(pair, *combination) for pair in PAIRS for combination in COMBINATIONS] + [
    *((pair, "default", layout) for pair in SHALLOWER for layout in ("pp2", "tp2_sp_pp2_full")),
    *(("llama_equal", EARLY, layout) for layout in ("pp2_vpp2", "pp2_vpp2_full", "tp2_sp_full")),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of every case."""
    root = tmp_path_factory.mktemp("layouts")
    pairs = {
        name: str(save_pair(root / name, **settings))  # type: ignore[arg-type]
        for name, settings in (PAIRS | SHALLOWER).items()
    }
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    for pair, method in sorted({(pair, method) for pair, method, _ in CASES}):
        cases[1].append(
            {
                "name": f"{pair}.{method}.reference",
                "pair": pairs[pair],
                "overrides": [*UPDATE, *METHODS[method]],
            }
        )
    for pair, method, layout in CASES:
        ranks, overrides, _ = LAYOUTS[layout]
        cases[ranks].append(
            {
                "name": f"{pair}.{method}.{layout}",
                "pair": pairs[pair],
                "overrides": [*UPDATE, *METHODS[method], *overrides],
            }
        )
    for ranks, of_ranks in cases.items():
        run_ranks("step", of_ranks, ranks, root)
    return root


@pytest.mark.parametrize(("pair", "method", "layout"), CASES)
def test_layout_changes_nothing(results: Path, pair: str, method: str, layout: str) -> None:
    reference = torch.load(results / f"{pair}.{method}.reference.pt")
    found = torch.load(results / f"{pair}.{method}.{layout}.pt")
    for name in ("loss", "grad_norm", "second_loss"):
        torch.testing.assert_close(found[name], reference[name], rtol=1e-5, atol=1e-8, msg=name)
    torch.testing.assert_close(found["cosine"], reference["cosine"], rtol=1e-5, atol=1e-6)
    if LAYOUTS[layout][2]:
        _assert_same_tensors(found["gradients"], reference["gradients"])
    _assert_same_tensors(found["weights"], reference["weights"])


def test_cases_differ_in_micro_batches(results: Path) -> None:
    """The micro-batch settings do what they say, or the comparison would compare nothing."""
    counts = {
        layout: torch.load(results / f"llama_equal.default.{layout}.pt")["num_micro_batches"]
        for layout in ("reference", "mbs1", "token_budget", "selective", "dp2_pp2")
    }
    assert counts["reference"] == 1
    assert counts["mbs1"] == 8
    assert 1 < counts["token_budget"] < 8
    assert counts["selective"] == 4
    assert counts["dp2_pp2"] == 4


def _assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        largest = float(tensor.abs().max())
        difference = float((found[name] - tensor).abs().max())
        assert difference <= 1e-5 * largest, f"{name}: {difference} of {largest}"
