from collections.abc import Callable

import pytest

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.errors import UserError
from megatron_oprd.planning.activations import KERNELS
from megatron_oprd.planning.estimate import MemoryEstimate, estimate_memory, read_models
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.ladder import check_fits, nearest_that_fits

KERNEL = KERNELS["transformer_engine"]
NO_RECOMPUTE = (
    "recompute={recompute_granularity: null, recompute_method: null, recompute_num_layers: null}"
)


def gpu(memory_gb: float) -> Hardware:
    return Hardware(memory_gb=memory_gb, tflops=989, bandwidth=3350, mfu=0.4)


def memory(config: RunConfig) -> MemoryEstimate:
    return estimate_memory(config, read_models(config), KERNEL, num_gpus=8, memory_gb=80)


@pytest.mark.parametrize(
    ("overrides", "memory_gb", "expected"),
    [
        # Activations of 36 layers are what is too much.
        ([NO_RECOMPUTE, "rollout.max_batch_size=2"], 50, "recompute.recompute_granularity=full "),
        (["teacher.precision=bf16", "rollout.max_batch_size=2"], 39, "teacher.precision=fp8"),
        ([], 45, "teacher.offload=cpu"),
        (["rollout.max_batch_size=2"], 33, "optimizer.offload_states=true"),
        (["teacher.target_memory_gb=null"], 55, "teacher.target_memory_gb=16.0"),
        (
            ["teacher.max_tokens=294912", "teacher.target_memory_gb=null"], 80,
            "teacher.max_tokens=null",
        ),
        # Keys and values of the rollout.
        ([], 42, "rollout.max_batch_size=8"),
        (
            ["teacher.precision=bf16", "teacher.target_memory_gb=null"], 55,
            "teacher.precision=fp8 teacher.target_memory_gb=16.0",
        ),
    ],
)  # fmt: skip
def test_nearest_change(
    qwen: Callable[..., RunConfig], overrides: list[str], memory_gb: float, expected: str
) -> None:
    """It names the first rung that fits, and a run that is started with it really fits."""
    config, hardware = qwen(*overrides), gpu(memory_gb)
    assert not memory(config).fits(hardware)
    found = nearest_that_fits(config, read_models(config), KERNEL, hardware, num_gpus=8)
    assert found is not None
    assert str(found).startswith(expected)
    again = memory(qwen(*overrides, *str(found).split()))
    assert again.fits(hardware)
    assert again.ranks == found.estimate.ranks


def test_changes_that_cannot_be_made_are_not_named(qwen: Callable[..., RunConfig]) -> None:
    """Eight kv heads, eight GPUs: TP 8 is the most, and PP 2 would leave no GPU for TP 8."""
    config = qwen("parallel.tensor_model_parallel_size=8", "teacher.fp8_recipe=blockwise")
    found = nearest_that_fits(config, read_models(config), KERNEL, gpu(26), num_gpus=8)
    assert found is not None
    assert "parallel" not in str(found)
    assert "teacher.offload" not in str(found), "Transformer Engine's recipes refuse it"


def test_errors(qwen: Callable[..., RunConfig]) -> None:
    config = qwen()
    models = read_models(config)
    check_fits(memory(config), models, KERNEL, gpu(80), num_gpus=8)
    with pytest.raises(
        UserError,
        match=r"the rollout phase needs 5\d\.\d GB on pipeline rank 0 \(an engine's owner\), "
        r"but a GPU has 42 \(--gpu-memory\)\. The nearest change that fits, in \d+\.\d GB: "
        r"rollout\.max_batch_size=8",
    ):
        check_fits(memory(config), models, KERNEL, gpu(42), num_gpus=8)


def test_nothing_fits(qwen: Callable[..., RunConfig]) -> None:
    """Most of the ladder is climbed already, so that the search for the rest is short."""
    config = qwen(
        "rollout.max_batch_size=1",
        "teacher.precision=fp8",
        "teacher.offload=cpu",
        "teacher.target_memory_gb=2",
        "optimizer.offload_states=true",
        "parallel.tensor_model_parallel_size=8",
    )
    with pytest.raises(UserError, match=r"a GPU has 1 .*None of the changes that were tried"):
        check_fits(memory(config), read_models(config), KERNEL, gpu(1), num_gpus=8)
