"""Stages 0 and 1 on a tiny pair: what comes out, that no layout changes it, and training on it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_oprd.bridge_build.fit import random_student
from megatron_oprd.bridge_build.sequences import split_prompts
from megatron_oprd.distill.bridge_file import PICTURE_FILE, TENSORS_FILE, BridgeFolder
from megatron_oprd.rollout.engine import Rollout
from tests.helpers.closeness import assert_close_relative
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks
from tests.helpers.selection import selected

TP2 = "parallel.tensor_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
CP2 = "parallel.context_parallel_size=2"
NO_RIDGE = "fit.ridge=1e-6"  # the default: the setting is of the other method
GRADIENT = [
    "fit.method=gradient",
    "fit.max_rows=150",
    "fit.epochs=3",
    "fit.batch_rows=32",
    NO_RIDGE,
]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "mbs1": (1, ["batch.micro_batch_size=1", "teacher.offload=cpu"]),
    "tp2": (2, [TP2]),
    "tp2_sp": (2, [TP2, SP]),
    "pp2_vpp2": (2, [PP2, VPP2]),
    "dp2": (2, []),
    "cp2": (2, [CP2]),
    # Replicas that run experts together.
    "moe_ep2": (2, ["parallel.expert_model_parallel_size=2"]),
}
PAIRS = [(0, 0), (1, 2), (2, 3), (3, 5)]
NIGHTLY = ("tp2", "dp2")


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("build_bridge")
    pair = save_pair(
        root / "pair", "qwen3", teacher_layers=6, tied=True, teacher_fields={"hidden_size": 48}
    )
    moe = save_pair(root / "moe", "qwen3_moe", teacher_layers=6, teacher_fields={"hidden_size": 48})
    (root / "bridge.yaml").write_text(
        f"""
output_dir: {root / "bridge"}
model: {{student: {pair / "student"}, teacher: {pair / "teacher"}, params_dtype: fp32}}
data: {{prompts: [{pair / "prompts.jsonl"}], max_prompt_tokens: 64}}
rollout: {{prompts_per_step: 4, samples_per_prompt: 2, max_new_tokens: 12}}
fit: {{ranks: [2, 4, 8], num_prompts: 16, ridge: 1.0e-4}}
"""
    )
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for name, (ranks, overrides) in {"one": (1, []), "moe_one": (1, []), **LAYOUTS}.items():
        if name in NIGHTLY and name not in selected(request):
            continue
        for method, settings in (("solved", []), ("descended", GRADIENT)):
            if method == "descended" and name not in ("one", "tp2_sp"):
                continue
            models = [f"model.{n}={moe / n}" for n in ("student", "teacher") if "moe" in name]
            cases[ranks].append(
                {
                    "name": f"{name}.{method}",
                    "config": str(root / "bridge.yaml"),
                    "overrides": [*overrides, *settings, *models],
                }
            )
    for ranks, of_ranks in cases.items():
        run_ranks("build_bridge", of_ranks, ranks, root)
    return root


@pytest.mark.parametrize(
    ("layout", "method"),
    [
        *(
            pytest.param(layout, "solved", marks=[pytest.mark.slow] * (layout in NIGHTLY))
            for layout in LAYOUTS
        ),
        ("tp2_sp", "descended"),
    ],
)
def test_layout_changes_nothing(root: Path, layout: str, method: str) -> None:
    one = "moe_one" if layout.startswith("moe") else "one"
    found = load_file(root / f"{layout}.{method}" / TENSORS_FILE)
    expected = load_file(root / f"{one}.{method}" / TENSORS_FILE)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = float((found[name] - tensor).abs().max() / tensor.abs().max())
        assert difference < 1e-4, f"{name}: {difference}"
    ours, theirs = (BridgeFolder(root / f"{n}.{method}").manifest for n in (layout, one))
    assert ours.data == theirs.data
    for rank, cosine in theirs.cosine.items():
        for when in ("before", "after"):
            assert ours.cosine[rank][when] == pytest.approx(cosine[when], abs=1e-5)


def hidden_rows(model: Path, rollouts: list[Rollout], layer: int) -> Tensor:
    """Hugging Face's states at the positions that predict the responses, [n, d], fp64."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    rows = []
    for one in rollouts:
        ids = torch.tensor([[*one.prompt_ids, *one.response_ids]])
        with torch.no_grad():
            states = hf(ids, output_hidden_states=True).hidden_states[layer + 1][0]
        rows.append(states[len(one.prompt_ids) - 1 : -1])
    return torch.cat(rows)


def both_rows(
    root: Path, rollouts: list[Rollout], layers: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    student, teacher = layers
    return (
        hidden_rows(root / "pair" / "student", rollouts, student),
        hidden_rows(root / "pair" / "teacher", rollouts, teacher),
    )


def test_projectors_and_cosines_are_those_of_transformers_states(root: Path) -> None:
    """The whole of it once more: transformers' models, SVD and lstsq on all rows in fp64."""
    rollouts = torch.load(root / "one.solved.rollouts.pt", weights_only=False)
    manifest = BridgeFolder(root / "one.solved").manifest
    tensors = load_file(root / "one.solved" / TENSORS_FILE)
    held_out = split_prompts([one.prompt_index for one in rollouts], share=0.1, seed=1234)
    assert len(held_out) == 2
    seen = [one for one in rollouts if one.prompt_index not in held_out]
    unseen = [one for one in rollouts if one.prompt_index in held_out]
    assert manifest.layer_pairs == PAIRS
    assert (manifest.data["sequences"], manifest.data["held_out_sequences"]) == (28, 4)
    for number, pair in enumerate(PAIRS):
        p_s, p_t, mean = (
            tensors[name].double()
            for name in (
                f"student.{pair[0]}.weight", f"teacher.{pair[1]}.weight", f"teacher.{pair[1]}.mean",
            )
        )  # fmt: skip
        h_s, h_t = both_rows(root, seen, pair)
        assert len(h_s) == manifest.data["rows"]
        assert_close_relative(mean, h_t.mean(0), 1e-5)
        directions = torch.linalg.svd(h_t - mean, full_matrices=False)[2][:8]
        overlap = (directions @ p_t.t()).abs()
        torch.testing.assert_close(overlap, torch.eye(8).double(), rtol=0, atol=2e-2)
        ridge = (1e-4 * h_s.square().sum() / 32).sqrt()
        padded = torch.cat([h_s, ridge * torch.eye(32, dtype=torch.float64)])
        targets = torch.cat([(h_t - mean) @ p_t.t(), torch.zeros(32, 8, dtype=torch.float64)])
        solution = torch.linalg.lstsq(padded, targets).solution.t()
        assert_close_relative(p_s, solution, 1e-3)

        h_s, h_t = both_rows(root, unseen, pair)
        start = random_student(8, 32, seed=1234 + number).double()
        for rank in (2, 4, 8):
            z_t = (h_t - mean) @ p_t[:rank].t()
            for when, weight in (("before", start), ("after", p_s)):
                cosine = torch.cosine_similarity(h_s @ weight[:rank].t(), z_t, dim=1).mean()
                found = manifest.cosine[str(rank)][when][number]
                assert found == pytest.approx(float(cosine), abs=1e-4)


def test_folder(root: Path) -> None:
    folder = root / "one.solved"
    assert {file.name for file in folder.iterdir()} == {
        TENSORS_FILE, PICTURE_FILE, "manifest.json",
    }  # fmt: skip
    assert (folder / PICTURE_FILE).read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["fit"]["method"] == "least_squares"
    assert manifest["student"]["architecture"]["hidden_size"] == 32
    assert manifest["teacher"]["architecture"]["hidden_size"] == 48
    descended = BridgeFolder(root / "one.descended").manifest
    assert descended.data["rows"] == 150


def test_training_through_the_bridge(root: Path) -> None:
    """The loss falls, the cosine rises, and the bridge is not touched."""
    bridge = root / "one.solved"
    before = (bridge / TENSORS_FILE).read_bytes()
    overrides = [
        f"bridge.path={bridge}", "bridge.rank=4", "loss.normalize=l2", "loss.coefficient=10",
        "train_iters=14", "optimizer.lr=1e-3", "optimizer.lr_decay_style=constant",
        "optimizer.lr_warmup_fraction=0", "rollout.prompts_per_step=16",
    ]  # fmt: skip
    case = {"name": "trained", "pair": str(root / "pair"), "overrides": overrides}
    run_ranks("loop", [case], 1, root / "training")
    lines = (root / "training" / "trained" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses, cosines = ([record[key] for record in records] for key in ("loss", "cosine"))
    assert len(records) == 14
    # || u - v ||^2 / r = 2 (1 - cos) / r
    assert losses[0] == pytest.approx(10 * 2 * (1 - cosines[0]) / 4, rel=1e-5)
    assert losses[-1] < 0.7 * losses[0]
    assert cosines[-1] > cosines[0]
    assert (bridge / TENSORS_FILE).read_bytes() == before


def test_command_line(root: Path, tmp_path: Path) -> None:
    """The table, on one process."""
    arguments = ["--config", str(root / "bridge.yaml"), "fit.num_prompts=4", "fit.ranks=[1,2]"]
    case = {"program": "megatron_oprd.build_bridge", "arguments": arguments}
    run_ranks("entry_point", [case], 1, tmp_path)
    shown = (tmp_path / "rank_0_of_1.log").read_text()
    assert "3 <- 5" in shown
    assert "r = 2" in shown
    assert f"the bridge: {root / 'bridge'}" in shown
    manifest = BridgeFolder(root / "bridge").manifest
    mean = sum(manifest.cosine["2"]["after"]) / 4
    (row,) = (line for line in shown.splitlines() if "mean " in line and "before" not in line)
    assert f"{mean:.3f}" in row
