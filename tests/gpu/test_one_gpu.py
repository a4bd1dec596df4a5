"""One step on a GPU against the same step on the CPU (docs/gpu-checks.md, 2)."""

import os
from pathlib import Path

import pytest
import torch

from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.helpers.closeness import assert_close_relative
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    pair = save_pair(root / "pair", request.param, teacher_layers=7)
    for device, visible in (("cpu", ""), ("gpu", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))):
        case = {"name": device, "pair": str(pair), "overrides": ["optimizer.lr=0"]}
        variables = {"CUDA_VISIBLE_DEVICES": visible, "NVIDIA_TF32_OVERRIDE": "0"}
        run_ranks("step", [case], 1, root, environment=variables)
    return root


def test_same_step(results: Path) -> None:
    gpu = torch.load(results / "gpu.pt", map_location="cpu")
    cpu = torch.load(results / "cpu.pt")
    for name in ("loss", "cosine", "grad_norm"):
        size = 1.0 if name == "cosine" else None
        assert_close_relative(gpu[name], cpu[name], 1e-3, size=size, what=name)
    for name, gradient in cpu["gradients"].items():
        assert_close_relative(gpu["gradients"][name], gradient, 1e-3, what=name)


def test_export_is_what_was_loaded(results: Path) -> None:
    """With a learning rate of 0 the weights are those of the folder."""
    weights = torch.load(results / "gpu.pt", map_location="cpu")["weights"]
    source = HFCheckpoint(results / "pair" / "student")
    assert sorted(weights) == sorted(source.names())
    for name, tensor in weights.items():
        assert torch.equal(tensor, source.read(name)), name
