"""ps_bank.pt as the reference implementation's script saves it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_oprd.config.schema import TapConfig
from megatron_oprd.distill.bridge_file import open_bridge
from megatron_oprd.distill.layer_map import LayerPair
from megatron_oprd.errors import UserError
from tests.training.test_layout import MODEL

PAIRS = [(0, 0), (1, 1), (2, 1), (3, 3)]
D_T = 40


def bank(**changes: Any) -> dict[str, Any]:
    """Its content, built with torch's own modules, for a student 48 wide."""
    torch.manual_seed(0)
    keys = [f"s{s}_t{t}" for s, t in PAIRS]
    projectors = nn.ModuleDict({key: nn.Linear(48, 4, bias=False) for key in keys})
    of_teacher = {t: (torch.randn(4, D_T), torch.randn(D_T)) for _, t in PAIRS}
    return {
        "rank": 4,
        "best_epoch": 20,
        "saved_from": "best_val",
        "projector_type": "linear",
        "mlp_hidden_mult": None,
        "layer_pairs": [{"student_layer": s, "teacher_layer": t} for s, t in PAIRS],
        "state_dict": nn.ModuleDict({"projectors": projectors}).state_dict(),
        "frozen_pt_weights": {f"s{s}_t{t}": of_teacher[t][0] for s, t in PAIRS},
        "frozen_pt_means": {f"s{s}_t{t}": of_teacher[t][1] for s, t in PAIRS},
    } | changes


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "ps_bank.pt")
    return folder / "ps_bank.pt"


def check(
    path: Path, *, pairs: list[tuple[int, int]] = PAIRS, width: int = D_T, **taps: Any
) -> None:
    open_bridge(path).check(
        student=MODEL,
        teacher=dataclasses.replace(MODEL, hidden_size=width),
        pairs=[LayerPair(s, t) for s, t in pairs],
        taps=TapConfig(**{"alignment": "token", **taps}),
    )


def test_projectors(tmp_path: Path) -> None:
    content = bank()
    path = saved(tmp_path, content)
    check(path)
    bridge = open_bridge(path)
    assert bridge.rank == 4
    read = bridge.read([LayerPair(2, 1), LayerPair(3, 3)], rank=3, device=torch.device("cpu"))
    assert sorted(read.student) == [2, 3]
    expected = content["state_dict"]["projectors.s2_t1.weight"][:3]
    assert torch.equal(read.student[2], expected)
    assert torch.equal(read.teacher[1], content["frozen_pt_weights"]["s2_t1"][:3])
    assert torch.equal(read.mean[1], content["frozen_pt_means"]["s2_t1"])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"width": 41}, r"for a teacher 40 wide, model\.teacher is 41 wide"),
        ({"pairs": [(1, 2)]}, "student layer 1 with teacher layer 1"),
        ({"alignment": "predictor"}, r"taps\.alignment = token, the run has predictor"),
        ({"last_layer": "pre_norm"}, r"taps\.last_layer = post_norm, the run has pre_norm"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, run: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(saved(tmp_path, bank()), **run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bank(projector_type="mlp"), "projector_type = 'mlp'"),
        (bank(subspace_mode="direct"), "subspace_mode = 'direct'"),
        (bank(frozen_pt_means={}), "KeyError: 's0_t0'"),
        (bank(rank=5), "4 and 4 rows for pair s0_t0, but rank 5"),
        ([1], "holds no dictionary"),
        (LayerPair(0, 0), "cannot read"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = saved(tmp_path, content)
    with pytest.raises(UserError, match=message):
        open_bridge(path)


def test_two_projectors_of_one_teacher_layer_are_refused(tmp_path: Path) -> None:
    content = bank()
    content["frozen_pt_weights"]["s2_t1"] = content["frozen_pt_weights"]["s2_t1"] + 1
    with pytest.raises(UserError, match="teacher layer 1 has two different projectors"):
        open_bridge(saved(tmp_path, content))
