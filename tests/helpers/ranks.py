"""Starts test workers on several ranks, as torchrun would, many cases to a start.

A worker is a module in tests/workers with ``run(case, directory)``, called on every rank for each
case in turn. Ranks are forks of servers that have imported torch, megatron-core and transformers.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

from torch.distributed import TCPStore

from tests.helpers.rank_server import STOP

ROOT = Path(__file__).resolve().parents[2]
# A slow machine takes longer for many cases than for one.
SECONDS_TO_START, SECONDS_A_CASE = 300, 30
# What takes long to import and starts no threads.
PRELOADED = (
    "megatron_oprd.training.loop",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing",
    "omegaconf",
    "sentencepiece",
    "transformers.convert_slow_tokenizer",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
)


def run_ranks(
    worker: str,
    cases: Sequence[dict[str, Any]],
    num_ranks: int,
    directory: Path,
    *,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Runs ``cases`` of a worker module on ``num_ranks`` processes; fails if any rank does.

    ``environment`` is added to the processes' own, which then import everything for themselves.
    """
    with StartedRanks(worker, cases, num_ranks, directory, environment=environment) as ranks:
        ranks.finish()


class StartedRanks:
    """Ranks at work on a job, of which one runs at a time; the end of ``with`` kills them.

    Arguments are those of `run_ranks`.
    """

    def __init__(
        self,
        worker: str,
        cases: Sequence[dict[str, Any]],
        num_ranks: int,
        directory: Path,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._name = f"{worker} on {num_ranks} ranks"
        self._end = time.monotonic() + SECONDS_TO_START + SECONDS_A_CASE * len(cases)
        directory.mkdir(parents=True, exist_ok=True)
        # As torchrun's agent does, this process has the store through which ranks meet, one for
        # each case: no port is chosen before it is listened on.
        self._stores = [TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) for _ in cases]
        ports = [store.port for store in self._stores]
        job = {"worker": worker, "cases": list(cases), "ports": ports}
        job_file = directory / f"job_{num_ranks}.json"
        job_file.write_text(json.dumps(job))
        self._logs = [(directory / f"rank_{rank}_of_{num_ranks}.log") for rank in range(num_ranks)]
        started = [
            (
                {
                    **rank_environment(),
                    **(environment or {}),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(num_ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                },
                str(log),
            )
            for rank, log in enumerate(self._logs)
        ]
        self._own_server: Connection | None = None
        # Neighbouring ranks are of different servers, so that sets of strings have different orders
        # in them, as in processes that torchrun starts.
        if environment is None:
            servers = _servers()
        else:
            self._own_server = _start_server((), environment)
            servers = (self._own_server,)
        self._ranks_of = {
            server: range(first, num_ranks, len(servers))
            for first, server in enumerate(servers[:num_ranks])
        }
        for server, ranks in self._ranks_of.items():
            server.send((str(job_file), [started[rank] for rank in ranks]))
        self._running = set(self._ranks_of)
        self._codes: list[int | None] = [None] * num_ranks

    def poll(self, seconds: float = 0) -> bool:
        """Whether ranks still run; waits at most ``seconds`` for one to fail or all to end."""
        for server in wait(self._running, seconds):
            self._read_codes(server)
        if any(self._codes):
            self.kill()
        return bool(self._running)

    def kill(self) -> None:
        """Kills the ranks that still run with SIGKILL; returns when they are gone."""
        for server in self._running:
            server.send(STOP)
        for server in list(self._running):
            self._read_codes(server)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        if self._own_server is not None:
            self._own_server.close()

    def finish(self) -> None:
        """Waits for the end; a rank that fails fails all."""
        while self.poll(1) and time.monotonic() < self._end:
            pass
        self.kill()
        if any(code != 0 for code in self._codes):
            tails = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self._logs)
            raise AssertionError(f"{self._name}: exit codes {self._codes}\n{tails}")

    def _read_codes(self, server: Any) -> None:
        """Takes a server's answer, which says that its ranks are gone."""
        self._running.remove(server)
        for rank, code in zip(self._ranks_of[server], server.recv(), strict=True):
            self._codes[rank] = code


@functools.cache
def _servers() -> tuple[Connection, ...]:
    # Otherwise pyarrow's allocator starts a thread when pyarrow is imported.
    without_threads = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
    return tuple(_start_server(PRELOADED, without_threads) for _ in range(2))


def _start_server(modules: Sequence[str], environment: Mapping[str, str]) -> Connection:
    """A server of ranks, which ends with this process or when the connection is closed."""
    ours, theirs = Pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.rank_server", str(theirs.fileno()), *modules],
        env={**rank_environment(), **environment},
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def rank_environment() -> dict[str, str]:
    """The environment of a process that runs on the CPU, beside others on few cores."""
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
