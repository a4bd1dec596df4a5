"""Runs whose rollout engines are killed or hang, with a stand-in for vLLM."""

import contextlib
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow

# The smallest bucket takes a part of the model only.
VLLM = [
    *("rollout.engine=vllm", "rollout.vllm.sync_bucket_mb=1"),
    *("train_iters=2", "optimizer.lr=0.01"),
    # What is past these is sent to engines that lack it, which the second sync's do not.
    "taps.layers=[0,1]",
]
SERVER = ["rollout.vllm.start_servers=1", *(one for one in VLLM if "bucket" not in one)]
SERVERS = [*SERVER[1:], "rollout.vllm.start_servers=2", "rollout.vllm.server_nodes=[0,1]"]
TP2_TWO_ENGINES = [*VLLM, "parallel.tensor_model_parallel_size=2"]
# One engine of two workers.
TP2 = [*TP2_TWO_ENGINES, "rollout.vllm.tensor_model_parallel_size=2"]
NEVER_AGAIN = ["rollout.vllm.max_restarts=0"]
# Name -> (settings, faults, folder). Process 1 is that of the start; two engines start 1 and 2.
CASES: dict[str, tuple[list[str], list[str], str]] = {
    "tp2": (TP2, [], "tp2"),
    "tp2_fails": (
        # Hangs in the second step's sync. Its successor is killed in the sync after the start, the
        # third in the rollout.
        [*TP2, "rollout.vllm.max_restarts=3", "rollout.vllm.sync_timeout_minutes=0.02"],
        ["1.weights.2.hang", "2.weights.1.kill", "3.generate.1.kill"],
        "tp2_fails",
    ),
    # An engine for each rank, of which one is killed in a sync.
    "tp2_two_engines": (TP2_TWO_ENGINES, ["1.weights.2.kill"], "tp2_two_engines"),
    "tp2_used_up": ([*TP2, *NEVER_AGAIN], ["1.generate.2.kill"], "tp2_used_up"),
    "tp2_resumed": (TP2, [], "tp2_used_up"),
    "dp2": (VLLM, [], "dp2"),
    # One of two engines, which does not start at first either.
    "dp2_fails": (VLLM, ["1.generate.2.kill", "3.build.1.kill"], "dp2_fails"),
    # A server for both, which is killed at the second step's first request. Its successor is killed
    # in the sync after its start.
    "dp2_server_fails": (SERVER, ["1.generate.9.kill", "2.weights.1.kill"], "dp2_server_fails"),
    # A server of each of two nodes, of which the second's rank controls no engine.
    "tp2_node_fails": ([*SERVERS, *TP2_TWO_ENGINES[-1:]], [], "tp2_node_fails"),
    "tp2_nodes_fail": ([*SERVERS, *TP2_TWO_ENGINES[-1:]], [], "tp2_nodes_fail"),
}
KILLED: dict[str, dict[str, Any]] = {
    "tp2_node_fails": {"nodes": True, "kill_server_before": 1, "kill_server_of": [1]},
    "tp2_nodes_fail": {"nodes": True, "kill_server_before": 1, "kill_server_of": [0, 1]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine_failures")
    pair = save_pair(root / "pair", "llama", tied=True, hidden_size=128, intermediate_size=192)
    cases = [
        {
            "name": name,
            "pair": str(pair),
            "overrides": overrides,
            "faults": faults,
            "folder": folder,
            **KILLED.get(name, {}),
        }
        for name, (overrides, faults, folder) in CASES.items()
    ]
    run_ranks("loop", cases, 2, root)
    return root


def result(root: Path, name: str) -> dict[str, Any]:
    return torch.load(root / f"{name}.pt", weights_only=False)


def records(root: Path, name: str) -> list[dict[str, Any]]:
    lines = (root / CASES[name][2] / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    others = (
        "seconds",
        "weight_sync_gb",
        "tokens_per_second",
        "peak_memory",
        "rollout_engine_restarts",
        "tflops_per_gpu",
        # These are of the engines, and of the time they take.
        "rollout_tokens_per_second",
        "rollout_idle_share",
        "rollout_kv_cache_peak",
        "rollout_queue_seconds",
        "rollout_preemptions",
    )
    return [{k: v for k, v in one.items() if not k.startswith(others)} for one in records]


def values(root: Path, name: str, metric: str) -> list[Any]:
    lines = (root / CASES[name][2] / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[metric] for line in lines]


@pytest.mark.parametrize(
    ("name", "layout", "count"),
    [
        ("tp2_fails", "tp2", 3),
        ("dp2_fails", "dp2", 2),
        ("dp2_server_fails", "dp2", 3),
        ("tp2_node_fails", "tp2", 0),
        ("tp2_nodes_fail", "tp2", 1),
    ],
)
def test_the_run_is_the_same(root: Path, name: str, layout: str, count: int) -> None:
    found, expected = result(root, name)["rollouts"], result(root, layout)["rollouts"]
    assert [len(of_step) for of_step in expected] == [8, 8]
    assert expected[0] != expected[1]
    assert found == expected
    assert records(root, name) == records(root, layout)
    assert values(root, layout, "rollout_engine_restarts") == [0, 0]
    assert values(root, name, "rollout_engine_restarts") == [0, count]


def test_how_full_engines_were(root: Path) -> None:
    """Sums and means over the engines, or over the servers."""
    assert values(root, "dp2", "rollout_preemptions") == [8, 8]
    assert values(root, "dp2", "rollout_queue_seconds") == [0.5, 0.5]
    assert list(values(root, "dp2", "rollout_kv_cache_peak_of_engine")[0]) == ["0", "1"]
    # In the second step one is killed, whose newest numbers nobody knows.
    assert values(root, "dp2_server_fails", "rollout_preemptions")[0] == 8
    assert values(root, "dp2_server_fails", "rollout_queue_seconds")[0] == 0.5
    assert list(values(root, "dp2_server_fails", "rollout_kv_cache_peak_of_engine")[0]) == ["0"]


def test_what_is_sent(root: Path) -> None:
    """An engine that is started again gets all, and one that has been there all along does not."""
    weights = load_file(root / "pair" / "student" / "model.safetensors")
    whole, part = (
        sum(tensor.nbytes for name, tensor in weights.items() if name.startswith(of)) / 1e9
        for of in ("model.", ("model.embed", "model.layers.0.", "model.layers.1."))
    )
    for name in ("tp2", "dp2"):
        assert values(root, name, "weight_sync_gb") == pytest.approx([whole, part])
    # The second process is killed in its sync, the third has it all before it is killed.
    assert values(root, "tp2_fails", "weight_sync_gb")[1] > 2 * whole
    assert values(root, "tp2_resumed", "weight_sync_gb") == pytest.approx([whole, whole])


def test_an_engine_for_each_rank(root: Path) -> None:
    """The number of engines, which has nothing to do with the layout, changes no response."""
    found = result(root, "tp2_two_engines")["rollouts"]
    assert found == result(root, "tp2")["rollouts"]
    assert records(root, "tp2_two_engines") == records(root, "tp2")
    assert values(root, "tp2_two_engines", "rollout_engine_restarts") == [0, 1]


@pytest.mark.parametrize(("name", "killed"), [("tp2_node_fails", [1]), ("tp2_nodes_fail", [0, 1])])
def test_each_node_starts_its_own_servers_again(root: Path, name: str, killed: list[int]) -> None:
    warnings = result(root, name)["warnings_of_ranks"]
    assert any("is left out until the next sync" in one for one in warnings[0]) == (killed == [1])
    for rank, own in enumerate(warnings):
        again = [one for one in own if "started again: it ended with exit code 137" in one]
        assert len(again) == (rank in killed)
        assert all(f"vllm_server_{rank}.log" in one for one in again)


@pytest.mark.parametrize(("name", "count"), [("dp2_server_fails", 3), ("tp2_nodes_fail", 4)])
def test_nothing_of_a_server_is_left(root: Path, name: str, count: int) -> None:
    """Of none that was started; each was two processes."""
    files = sorted((root / f"{name}.faults").glob("process_*/pids"))
    assert len(files) == count
    for file in files:
        for pid in map(int, file.read_text().split()):
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).wait(timeout=30)  # what was killed may not be gone at once
    assert (root / name / "vllm_server_0.log").exists()


def test_used_up(root: Path) -> None:
    """The state before the step is saved, and the run goes on from there as if nothing had been."""
    stopped = result(root, "tp2_used_up")["stopped"]
    assert "rollout engine 0 failed and was not started again (0 restarts in this step" in stopped
    assert "rollout.vllm.max_restarts = 0): the vLLM process ended with exit code -9" in stopped
    assert "the newest checkpoint is of step 1" in stopped
    (second,) = result(root, "tp2_resumed")["rollouts"]
    assert second == result(root, "tp2")["rollouts"][1]
    assert records(root, "tp2_resumed") == records(root, "tp2")
