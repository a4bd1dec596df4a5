"""Servers of two nodes, each of one rank: who starts them, and starts them again."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.config.schema import ParallelConfig, RolloutConfig
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.rollout.engine import RolloutEngineError, SamplingParams
from megatron_oprd.rollout.pool import EnginePool
from megatron_oprd.rollout.vllm import launch, opening
from tests.helpers.ranks import ROOT

FAKE = str(ROOT / "tests" / "fakes" / "quick_server.py")


class Engine:
    """Takes weights, and never generates."""

    def needs_all_weights(self) -> bool:
        return True

    def load_weights(self, stream: Any, **options: Any) -> None:
        for _ in stream:
            pass

    def generate(self, prompts: Any, sampling: SamplingParams) -> Any:
        raise RolloutEngineError("no server is left")

    def close(self) -> None:
        pass


def stream(*, trainable_only: bool, wanted: bool) -> Any:
    return iter([("a", torch.ones(1))])


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {folders}, a model folder for each rank as quick_server.py reads it.

    A rank writes what it knows of the servers to rank_N.json.
    """
    rank = os.environ["RANK"]
    os.environ |= {"GROUP_RANK": rank, "LOCAL_RANK": "0"}
    folder = Path(case["folders"][int(rank)])
    launch.serve_command = _quick_server
    urls: list[str] = []

    def create(rollout: RolloutConfig, *_: Any, **__: Any) -> Engine:
        urls[:] = rollout.vllm.servers
        return Engine()

    opening.create_vllm = create  # type: ignore[assignment]
    model: Any = SimpleNamespace(folder=folder, dtype=torch.float32, max_model_len=64)
    vllm = VLLMConfig(start_servers=2, server_nodes=[0, 1], max_restarts=1)
    rollout = RolloutConfig(engine="vllm", vllm=vllm)
    # One engine: the second node's rank owns none.
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    with parallel_run(parallel, seed=0) as context:
        error = ""
        try:
            with opening.open_vllm(rollout, model, context, log_prefix=f"{directory}/") as starter:
                engines = EnginePool(starter, stream, context=context)
                _kill(folder, 1, only_on=1)
                engines.sync()
                _wait_for_start(folder, 2, only_on=1)
                _kill(folder, 2, only_on=1)
                if rank == "1":
                    (folder / "behaviour").write_text("end")
                engines.generate([], SamplingParams(max_new_tokens=1, seed=0))
        except RolloutEngineError as found:
            error = str(found)
        secret = os.environ["MEGATRON_OPRD_SERVER_SECRET"]
        result = {"urls": urls, "error": error, "secret": secret}
        (directory / f"rank_{rank}.json").write_text(json.dumps(result))


def _quick_server(folder: Path) -> list[str]:
    return [sys.executable, FAKE, str(folder)]


def _kill(folder: Path, number: int, *, only_on: int) -> None:
    """Kills a rank's server, and waits until its guard has seen it."""
    if dist.get_rank() == only_on:
        first, *_ = json.loads((folder / f"started_{number}.json").read_text())["pids"]
        guard = psutil.Process(first).parent()
        assert guard is not None
        os.kill(first, signal.SIGKILL)
        # A zombie until its parent, this process, asks for its exit code.
        while guard.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


def _wait_for_start(folder: Path, number: int, *, only_on: int) -> None:
    if dist.get_rank() == only_on:
        while not (folder / f"started_{number}.json").exists():
            time.sleep(0.01)
    dist.barrier()
