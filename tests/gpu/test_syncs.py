"""The host waits for the device as often in a deep model as in a shallow one."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Transformer Engine's attention packs sequences in bf16 only.
PACKED = ["batch.sequence_packing=true", "model.params_dtype=bf16"]
SETTINGS = {
    "padded": [],
    "packed": PACKED,
    "fp8": [*PACKED, "teacher.precision=fp8"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_not_by_layer(tmp_path: Path, name: str) -> None:
    gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    found = []
    for depth in (4, 8):
        pair = save_pair(
            tmp_path / f"of_{depth}", "qwen3", num_hidden_layers=depth, teacher_layers=depth
        )
        case = {"name": str(depth), "pair": str(pair), "overrides": SETTINGS[name]}
        run_ranks("syncs", [case], 1, tmp_path, environment=gpu)
        found.append(json.loads((tmp_path / f"{depth}.json").read_text()))
    assert found[0] == found[1]
    assert "synchronizations" in found[0]
