"""An FP8 teacher on a GPU against the same one on the CPU (docs/gpu-checks.md, 8)."""

import os
from pathlib import Path

import pytest
import torch

from megatron_oprd.models.fp8_codes import FORMATS
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_tiny_model, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fp8")
    config = tiny_config("qwen2", hidden_size=160, num_attention_heads=8, tie_word_embeddings=True)
    save_tiny_model(root / "model", config, seed=0)
    for device, visible in (("cpu", ""), ("gpu", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))):
        cases = [
            {
                "name": f"{device}.{recipe}",
                "folder": str(root / "model"),
                "teacher": {"precision": "fp8", "fp8_recipe": recipe},
                "parallel": {},
                "params_dtype": "fp32",
                "sequences": [[0, 96, 5, 17, 60, 33, 8, 21], [44, 3, 90, 12]],
                "pretend": False,
            }
            for recipe in FORMATS
        ]
        run_ranks("fp8", cases, 1, root, environment={"CUDA_VISIBLE_DEVICES": visible})
    return root


@pytest.mark.parametrize("recipe", FORMATS)
def test_same_hidden_states(results: Path, recipe: str) -> None:
    gpu, cpu = (
        torch.load(results / f"{device}.{recipe}.pt", map_location="cpu")
        for device in ("gpu", "cpu")
    )
    assert (gpu["error"], gpu["bytes"]) == (None, cpu["bytes"])
    for found, expected in zip(gpu["states"], cpu["states"], strict=True):
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-3
