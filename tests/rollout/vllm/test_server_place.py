"""Where a run's own vLLM server listens, and which GPUs it may have."""

import pytest

from megatron_oprd.errors import UserError
from megatron_oprd.rollout.vllm.launch import check_gpus, host_of

TABLE = "0, GPU-aa\n1, GPU-bb\n2, GPU-cc\n3, GPU-dd\n"


def test_loopback_on_one_machine() -> None:
    assert host_of([("one", "10.0.0.1")] * 3) == "127.0.0.1"


def test_what_the_other_machine_calls_it() -> None:
    """Not what the machine takes for its own name, which may be a loopback address."""
    ranks = [("one", "127.0.1.1"), ("one", "127.0.1.1"), ("two", "10.0.0.1"), ("two", "10.0.0.1")]
    assert host_of(ranks) == "10.0.0.1"


def test_gpus_that_are_free() -> None:
    """Ranks have the second and the last: their devices are not numbered as nvidia-smi's."""
    check_gpus([2, 0], TABLE, ["bb", "dd"])


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (
            [],
            r"start_servers needs .*server_gpus: free for a server here are \[0, 2\]",
        ),
        ([4], r"server_gpus = \[4\]: there is no GPU 4 here .*; free for .* \[0, 2\]"),
        ([2, 3], r"server_gpus = \[2, 3\]: a rank trains on GPU 3; free for .* \[0, 2\]"),
    ],
)
def test_gpus_that_are_not(gpus: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_gpus(gpus, TABLE, ["bb", "dd"])


def test_no_gpu_is_left() -> None:
    with pytest.raises(UserError, match="a rank trains on GPU 0; no GPU is left"):
        check_gpus([0], "0, GPU-aa\n", ["aa"])
