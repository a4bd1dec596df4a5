"""A step asks the device for values a number of times that does not grow with the model's depth."""

import json
from pathlib import Path

import pytest

from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks

SETTINGS = {
    "padded": [],
    "packed": ["batch.sequence_packing=true"],
    "fp8": ["batch.sequence_packing=true", "teacher.precision=fp8"],
    "chunks": [
        "batch.sequence_packing=true",
        "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size=2",
    ],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("syncs")
    for depth in (4, 8):
        pair = save_pair(
            root / f"of_{depth}", "qwen3", num_hidden_layers=depth, teacher_layers=depth
        )
        for name, overrides in SETTINGS.items():
            case = {"name": f"{name}-{depth}", "pair": str(pair), "overrides": overrides}
            run_ranks("syncs", [case], 2 if name == "chunks" else 1, root)
    return root


@pytest.mark.parametrize("name", SETTINGS)
def test_not_by_layer(results: Path, name: str) -> None:
    shallow, deep = (json.loads((results / f"{name}-{depth}.json").read_text()) for depth in (4, 8))
    assert deep == shallow
    # Once for each micro-batch, whatever the layers and chunks.
    assert deep["select"] == deep["micro_batches"]
