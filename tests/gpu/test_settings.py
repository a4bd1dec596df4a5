"""Settings of a step on a GPU against the same settings on the CPU (docs/gpu-checks.md, 2)."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.closeness import assert_close_relative
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FULL = [
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=uniform",
    "recompute.recompute_num_layers=1",
]
BF16 = "model.params_dtype=bf16"
MBS1, MBS2 = (f"batch.micro_batch_size={n}" for n in (1, 2))
# name: pair, overrides on both devices. Both in fp32.
SAME: dict[str, tuple[str, list[str]]] = {
    "mbs2": ("qwen3", [MBS2]),
    "full": ("qwen3", FULL),
    "selective": ("qwen3", ["recompute.recompute_granularity=selective"]),
    "target_groups": ("qwen3", [MBS1, "teacher.target_memory_gb=1.2e-5"]),
    "offloaded_teacher": ("qwen3", ["teacher.offload=cpu"]),
    "fp8_teacher": ("qwen3", ["teacher.precision=fp8"]),
    "reverse_kl": ("qwen3", ["output_loss.kind=reverse_kl"]),
    "top_k": ("qwen3", ["output_loss.kind=top_k", "output_loss.k=5", "taps.layers=none"]),
    "moe": ("moe", []),
    "moe_full": ("moe", FULL),
}
# name: pair, overrides on the GPU, which is in bf16; against the CPU's step without them, in fp32.
# (Transformer Engine's attention packs sequences in bf16 only.)
IN_BF16: dict[str, tuple[str, list[str]]] = {
    "bf16": ("qwen3", []),
    "bf16_packed": ("qwen3", ["batch.sequence_packing=true", "batch.max_tokens=40"]),
    "bf16_full": ("qwen3", FULL),
    "bf16_offloaded_states": ("qwen3", ["optimizer.offload_states=true"]),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("settings")
    pairs = {
        "qwen3": save_pair(root / "qwen3", "qwen3", teacher_layers=7, tied=True),
        "moe": save_pair(root / "moe", "qwen3_moe", teacher_layers=6),
    }

    def case(name: str, pair: str, overrides: list[str]) -> dict[str, Any]:
        return {"name": name, "pair": str(pairs[pair]), "overrides": overrides}

    on_cpu = [case(f"cpu.{name}", *of_case) for name, of_case in SAME.items()]
    on_gpu = [case(f"gpu.{name}", *of_case) for name, of_case in SAME.items()]
    on_gpu += [
        case(f"gpu.{name}", pair, [BF16, *overrides]) for name, (pair, overrides) in IN_BF16.items()
    ]
    gpu = {
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
        "NVIDIA_TF32_OVERRIDE": "0",
    }
    run_ranks("step", on_cpu, 1, root)
    run_ranks("step", on_gpu, 1, root, environment=gpu)
    return root


@pytest.mark.parametrize("name", SAME)
def test_same_step(results: Path, name: str) -> None:
    assert_same_step(results / f"gpu.{name}.pt", results / f"cpu.{name}.pt", 1e-3, gradients=1e-3)


@pytest.mark.parametrize("name", IN_BF16)
def test_same_step_in_bf16(results: Path, name: str) -> None:
    assert_same_step(results / f"gpu.{name}.pt", results / "cpu.mbs2.pt", 3e-2, gradients=0.15)


def assert_same_step(on_gpu: Path, on_cpu: Path, tolerance: float, *, gradients: float) -> None:
    gpu, cpu = torch.load(on_gpu, map_location="cpu"), torch.load(on_cpu)
    for key in ("loss", "cosine", "grad_norm", "output_loss"):
        if cpu[key] is not None:
            if key == "cosine":
                assert_close_relative(gpu[key], cpu[key], tolerance / 10, size=1.0, what=key)
            else:
                assert_close_relative(gpu[key], cpu[key], tolerance, what=key)
    for key, gradient in cpu["gradients"].items():
        difference = float((gpu["gradients"][key] - gradient).norm())
        assert difference <= gradients * float(gradient.norm()), key
