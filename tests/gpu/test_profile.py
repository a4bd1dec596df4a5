"""The snapshot of a GPU's memory."""

from pathlib import Path

import pytest
import torch

from megatron_oprd.config.schema import ProfileConfig
from megatron_oprd.training.profile import Profiler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_snapshot_of_memory(tmp_path: Path) -> None:
    profiler = Profiler(ProfileConfig(start=0, end=1, kind="memory"), tmp_path, rank=0)
    profiler.begin(0)
    kept = torch.ones(1 << 20, device="cuda")
    profiler.end(0)
    assert (tmp_path / "profile" / "step_0_rank_0.pickle").stat().st_size > 1000
    assert float(kept[0]) == 1.0
