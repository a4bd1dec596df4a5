"""The steps of `tests.workers.step` with matrices that add their gradients to the buffers.

Megatron's own linear modules stand in for Transformer Engine's, which need a GPU: with Megatron's
option for Apex's kernel they do the same, and hand autograd a gradient of arbitrary numbers.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from torch import Tensor

from tests.workers import step

calls = 0


class _Switch:
    """Transformer Engine's name of the attribute that Megatron's modules read."""

    def __get__(self, module: Any, owner: type) -> bool:
        return False

    def __set__(self, module: Any, fuses: bool) -> None:
        module.gradient_accumulation_fusion = fuses


def _accumulate(inputs: Tensor, gradient: Tensor, main_grad: Tensor) -> None:
    global calls
    calls += 1
    main_grad.add_(gradient.t() @ inputs)


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case of `tests.workers.step`."""
    before = calls
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        result = empty(*args, **kwargs)
        return result.fill_(7.0) if result.is_floating_point() else result

    with (
        mock.patch.object(ColumnParallelLinear, "fuse_wgrad_accumulation", _Switch(), create=True),
        mock.patch.object(RowParallelLinear, "fuse_wgrad_accumulation", _Switch(), create=True),
        mock.patch.object(
            layers,
            "fused_weight_gradient_mlp_cuda",
            SimpleNamespace(wgrad_gemm_accum_fp32=_accumulate),
            create=True,
        ),
        mock.patch.object(torch, "empty", filled),
    ):
        step.run(case, directory)
    assert calls > before, "no gradient went to the buffers"
