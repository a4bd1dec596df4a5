"""Which syncs are checked."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_oprd.rollout.vllm.sync_check import SyncCheck
from tests.helpers.tiny import save_tiny_model, tiny_config


def test_every_nth_sync_is_checked(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tiny_config("llama"), seed=0)
    weights = load_file(tmp_path / "model.safetensors")
    for interval, expected in ((1, [True] * 4), (2, [True, False] * 2), (None, [False] * 4)):
        check = SyncCheck(tmp_path, dtype=torch.float32, interval=interval)
        due = []
        for _ in expected:
            list(check.passing(weights.items()))
            due.append(check.is_due)
        assert due == expected, interval
