"""Weights to an engine's process by CUDA IPC, on the trainer's GPU and on another one."""

import pytest
import torch

from tests.helpers.bucket_process import check_other_process

pytestmark = pytest.mark.gpu

FIRST = torch.device("cuda", 0)


@pytest.mark.parametrize("index", [0, 1])
def test_another_process(index: int) -> None:
    if index >= torch.cuda.device_count():
        pytest.skip(f"needs {index + 1} GPUs")
    check_other_process(FIRST, torch.device("cuda", index))
