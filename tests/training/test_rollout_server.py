"""Two replicas with rollouts from servers, stand-ins, that are started again or go away."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import count
from typing import Any

import pytest
import torch

from megatron_oprd.rollout.vllm.client import GENERATE
from tests.fakes.vllm_server import FakeServer
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow

SETTINGS = [
    *("rollout.engine=vllm", "rollout.vllm.check_weights_interval=1"),
    *("rollout.vllm.sync_timeout_minutes=0.5", "train_iters=2", "optimizer.lr=0.01"),
    # The second sync leaves out what is past these.
    "taps.layers=[0,1]",
]
CASES = {
    "undisturbed": [],
    "started_again": [],
    "gone": ["rollout.vllm.max_restarts=1", "rollout.vllm.sync_timeout_minutes=0.02"],
    # Two servers; one ends with its sixth request, in the first or the second step.
    "one_of_two": [],
    # Three steps ahead; the second server's responses take longer than a step.
    "ahead": ["rollout.max_staleness=3", "train_iters=6", "checkpoint.save_interval=5"],
}
FAILING = 10  # the request that fails; a server alone gets it in the second of two steps


def disturb(server: FakeServer, name: str, failing: int = FAILING) -> None:
    requests = count(1)

    def generate() -> tuple[int, bytes] | None:
        if next(requests) != failing:
            return None
        server.start_again()
        if name == "gone":
            server.instead["/health"] = lambda: (503, b"ending")
        return 500, b"lost"

    server.instead[GENERATE] = generate


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    root = tmp_path_factory.mktemp("rollout_server")
    pair = save_pair(root / "pair", "llama", tied=True)
    with ExitStack() as stack:
        servers = {name: stack.enter_context(closing(FakeServer({}))) for name in CASES}
        disturb(servers["started_again"], "started_again")
        disturb(servers["gone"], "gone")
        disturb(servers["one_of_two"], "gone", failing=6)
        slow = stack.enter_context(closing(FakeServer({})))
        slow.instead[GENERATE] = lambda: time.sleep(0.5)
        second = stack.enter_context(closing(FakeServer({})))
        urls = {name: server.url for name, server in servers.items()}
        urls["one_of_two"] += f",{second.url}"
        urls["ahead"] += f",{slow.url}"
        cases = [
            {
                "name": name,
                "pair": str(pair),
                "overrides": [*SETTINGS, *overrides, f"rollout.vllm.servers=[{urls[name]}]"],
            }
            for name, overrides in CASES.items()
        ]
        run_ranks("loop", cases, 2, root)
        yield {
            name: (server, torch.load(root / f"{name}.pt", weights_only=False))
            for name, server in servers.items()
        }


def test_one_sync_for_all_replicas(servers: dict[str, Any]) -> None:
    server, result = servers["undisturbed"]
    assert server.num_syncs == 2
    assert [len(of_step) for of_step in result["rollouts"]] == [8, 8]
    assert [{r.weights_version for r in step} for step in result["rollouts"]] == [{0}, {1}]
    assert result["rollouts"][0] != result["rollouts"][1]


def test_a_server_that_is_started_again(servers: dict[str, Any]) -> None:
    server, result = servers["started_again"]
    assert result["rollouts"] == servers["undisturbed"][1]["rollouts"]
    assert server.num_syncs == 3
    assert server.weights.keys() == servers["undisturbed"][0].weights.keys()
    for name, tensor in servers["undisturbed"][0].weights.items():
        assert torch.equal(server.weights[name], tensor), name


def test_a_server_that_goes_away(servers: dict[str, Any]) -> None:
    """The error says what is there to go on from."""
    stopped = servers["gone"][1]["stopped"]
    assert "(1 restarts in this step, rollout.vllm.max_restarts = 1)" in stopped
    assert "answers /health with 503: ending" in stopped
    assert "the newest checkpoint is of step 1" in stopped


def test_one_of_two_servers_goes_away(servers: dict[str, Any]) -> None:
    """Its requests are repeated on the other with the same result; no engine is started again."""
    server, result = servers["one_of_two"]
    assert result["stopped"] == ""
    assert result["rollouts"] == servers["undisturbed"][1]["rollouts"]
    assert server.label == "default", "it has failed"


def test_several_steps_ahead(servers: dict[str, Any]) -> None:
    """Weights come while responses are under way; no rollout is older than allowed."""
    server, result = servers["ahead"]
    assert result["stopped"] == ""
    assert server.num_syncs == 6
    # A checkpoint is written after step 4, so that step 5 has rollouts of its own weights.
    for step, rollouts in enumerate(result["rollouts"]):
        begun = max(0, step - 3) if step < 5 else 5
        assert {one.weights_version for one in rollouts} <= set(range(begun, step + 1))
        assert len(rollouts) == 8
    assert any(one.weights_version < 4 for one in result["rollouts"][4])
    assert server.pauses == server.resumes > 0
