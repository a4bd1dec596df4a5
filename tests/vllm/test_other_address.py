"""A run whose server was started by hand, with a secret, at an address that other nodes reach."""

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_oprd.errors import UserError
from megatron_oprd.rollout.vllm.client import ServerClient, check_server
from megatron_oprd.rollout.vllm.messages import EXTENSION
from megatron_oprd.rollout.vllm.secret import MIDDLEWARE, VARIABLE
from megatron_oprd.rollout.vllm.transfers import TCP
from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import ROOT, run_ranks
from tests.vllm.engines import check_greedy

pytestmark = pytest.mark.slow

SECRET = "known to both"
SECONDS_TO_START = 300
RUN = [
    *("rollout.engine=vllm", "rollout.vllm.check_weights_interval=1", "train_iters=2"),
    *("rollout.logprob_check_interval=1", "rollout.temperature=0", "optimizer.lr=0.01"),
    *("rollout.oversample=0.5", "rollout.oversample_interval=4"),
]


def _address() -> str:
    """An address of this machine that is not loopback; skips without one."""
    for interface in psutil.net_if_addrs().values():
        for one in interface:
            if one.family == socket.AF_INET and not one.address.startswith("127."):
                return one.address
    pytest.skip("this machine has no address but loopback")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other_address") / "pair"
    return save_pair(folder, "llama", hidden_size=128, intermediate_size=192)


@pytest.fixture(scope="module")
def url(pair: Path) -> Iterator[str]:
    """As docs/rollouts.md says, on a CPU."""
    address = _address()
    with socket.create_server((address, 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(pair / "student"), "--dtype", "float32", "--max-model-len", "256"),
        *("--enable-scale-out", "--worker-extension-cls", EXTENSION, "--middleware", MIDDLEWARE),
        *("--weight-transfer-config", json.dumps({"backend": TCP})),
        *("--host", address, "--port", str(port)),
        # The tiny model, on a machine that does other things.
        *("--enforce-eager", "--kv-cache-memory-bytes", "250000000"),
    ]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        VARIABLE: SECRET,
    }
    with (pair / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://{address}:{port}"
    try:
        ServerClient(url).wait(SECONDS_TO_START)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_who_may_ask(url: str, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody without the secret, and nobody at another address."""
    with pytest.raises(UserError, match="401"):
        check_server(url, pair / "student", dtype=torch.float32, max_model_len=76)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}/metrics", timeout=30)
    port = int(url.rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=30)
    monkeypatch.setenv(VARIABLE, SECRET)
    check_server(url, pair / "student", dtype=torch.float32, max_model_len=76)


def test_a_run(url: str, pair: Path, tmp_path: Path) -> None:
    """Weights, responses in rounds and metrics cross the network's address."""
    overrides = [*RUN, f"rollout.vllm.servers=[{url}]"]
    case: dict[str, Any] = {"name": "run", "pair": str(pair), "overrides": overrides}
    run_ranks("loop", [case], 2, tmp_path, environment={VARIABLE: SECRET})
    found = torch.load(tmp_path / "run.pt", weights_only=False)
    assert found["stopped"] == ""
    first, second = found["rollouts"]
    assert [{one.weights_version for one in of_step} for of_step in (first, second)] == [{0}, {1}]
    checkpoint = HFCheckpoint(pair / "student")
    weights = {name: checkpoint.read(name) for name in checkpoint.names()}
    check_greedy(pair / "student", weights, first)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        # Nats a token, of log-probabilities of up to 20.
        assert record["weight_sync_logprob_diff_max"] < 1e-4 * 20
        assert record["rollout_queue_seconds"] >= 0
        assert record["rollout_preemptions"] == 0
        assert list(record["rollout_kv_cache_peak_of_engine"]) == ["0"]
