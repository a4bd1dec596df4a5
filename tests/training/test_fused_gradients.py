"""Gradients that matrices add to the buffers themselves, as Transformer Engine's do."""

from pathlib import Path

import pytest
import torch

from tests.helpers.closeness import assert_close_relative
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks
from tests.helpers.selection import cases as as_parameters
from tests.helpers.selection import selected

MBS1 = "batch.micro_batch_size=1"
OVERLAP = ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]
SETTINGS = {
    "micro_batches": [MBS1],
    # Several teacher passes, and with them several student passes, in a step.
    "groups": [MBS1, "teacher.target_memory_gb=1.2e-5"],
    "head": [MBS1, "output_loss.kind=reverse_kl"],
    "overlap": [MBS1, *OVERLAP],
    "recompute": [
        MBS1,
        "recompute.recompute_granularity=full",
        "recompute.recompute_method=uniform",
        "recompute.recompute_num_layers=1",
    ],
    "frozen_layers": [MBS1, "taps.layers=[0,2]"],
}
NIGHTLY = ("recompute", "frozen_layers")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fused")
    pair = str(save_pair(root / "pair", "qwen3", teacher_layers=7, tied=True))
    for kind, worker in (("plain", "step"), ("fused", "fused_gradients")):
        cases = [
            {"name": f"{kind}.{name}", "pair": pair, "overrides": overrides}
            for name, overrides in SETTINGS.items()
            if name in selected(request)
        ]
        run_ranks(worker, cases, 1, root)
    return root


@pytest.mark.parametrize("name", as_parameters(SETTINGS, nightly=NIGHTLY))
def test_same_step(results: Path, name: str) -> None:
    fused, plain = (torch.load(results / f"{kind}.{name}.pt") for kind in ("fused", "plain"))
    assert fused["num_groups"] == plain["num_groups"]
    assert (plain["num_groups"] > 1) == (name == "groups")
    assert_close_relative(fused["grad_norm"], plain["grad_norm"], 1e-5)
    assert_close_relative(fused["second_loss"], plain["second_loss"], 1e-5)
    for kind in ("gradients", "weights"):
        assert fused[kind].keys() == plain[kind].keys()
        for key, expected in plain[kind].items():
            assert_close_relative(fused[kind][key], expected, 5e-5, what=(kind, key))
