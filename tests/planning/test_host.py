"""Offload with too little host memory is refused before weights are read."""

from pathlib import Path

import pytest

from megatron_oprd.errors import UserError
from megatron_oprd.planning.estimate import check_host_memory
from tests.helpers.pairs import config_of, save_pair

BF16 = "model.params_dtype=bf16"
NO_CHECKPOINTS = "checkpoint.save_interval=null"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("host") / "pair", "llama")


def check(pair: Path, *overrides: str, available_bytes: int) -> None:
    check_host_memory(
        config_of(pair, [NO_CHECKPOINTS, *overrides]),
        num_ranks=2,
        ranks_on_host=2,
        available_bytes=available_bytes,
    )


def test_teacher(pair: Path) -> None:
    # bf16: 128 embedding rows of 32; a layer's 32x(32+32) QKV, 32x32 and 3 x 32x64, two norms; the
    # final norm; on each of two data-parallel ranks.
    one = 2 * (128 * 32 + 4 * (64 * 32 + 32 * 32 + 3 * 64 * 32 + 2 * 32) + 32)
    check(pair, BF16, "teacher.offload=cpu", available_bytes=2 * one)
    with pytest.raises(UserError, match=r"teacher\.offload = cpu .* for the 2 ranks"):
        check(pair, BF16, "teacher.offload=cpu", available_bytes=2 * one - 1)


def test_states(pair: Path) -> None:
    with pytest.raises(UserError, match=r"offload_states = true need"):
        check(pair, BF16, "optimizer.offload_states=true", available_bytes=1000)


def test_nothing_offloaded_needs_nothing(pair: Path) -> None:
    check(pair, available_bytes=0)


def test_all_teachers_together(pair: Path) -> None:
    one = 2 * (128 * 32 + 4 * (64 * 32 + 32 * 32 + 3 * 64 * 32 + 2 * 32) + 32)
    extra = f"extra_teachers=[{{model: {pair / 'teacher'}}}]"
    check(pair, BF16, "teacher.offload=cpu", extra, available_bytes=4 * one)
    with pytest.raises(UserError, match=r"extra_teachers\[0\] need"):
        check(pair, BF16, "teacher.offload=cpu", extra, available_bytes=4 * one - 1)


def test_checkpoints(pair: Path) -> None:
    """Half of the trained weights' fp32 copies and moments on each of two ranks, one model."""
    layers = 4 * (64 * 32 + 32 * 32 + 3 * 64 * 32 + 2 * 32) + 32
    needed = (128 * 32 + layers) * 12 + (2 * 128 * 32 + layers) * 2
    on = "checkpoint.save_interval_minutes=5"
    for optimizer in ("true", "false"):  # whose states one rank writes
        settings = [BF16, on, f"optimizer.use_distributed_optimizer={optimizer}"]
        check(pair, *settings, available_bytes=needed)
        with pytest.raises(UserError, match=r"checkpoints.* need"):
            check(pair, *settings, available_bytes=needed - 1)
