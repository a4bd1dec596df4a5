"""Starts ranks for groups of cases on all machines of a run, and ends those that fail or hang.

Each process of the self-test is an agent: one for each rank of torchrun's, or one in all without
torchrun. An agent starts ranks of its own, which join process groups of their own. So a rank that
fails or hangs ends neither the self-test nor the cases after it.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_oprd.parallel.node import Node
from megatron_oprd.selftest.cases import Case, Result, Status

# Imports of torch, megatron-core and Transformer Engine, on a cold disk and a busy machine.
SECONDS_TO_START = 120
_SECONDS_TO_END = 60  # after the last case
_SECONDS_AFTER_A_FAILURE = 1
_POLL_SECONDS = 0.1
# Each of several ranks on one GPU is a host of its own for NCCL, which otherwise refuses two ranks
# of a host on one device. Hosts have no memory in common: they talk over the loopback interface.
_SHARED_GPU = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_MAX_NCHANNELS": "2",
}


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """One start of ranks; the same on all agents."""

    number: int
    cases: list[Case]
    ports: list[int]  # of the store through which the ranks of a case meet
    num_ranks: int
    folder: str


class Agents:
    """This agent, among those of all machines.

    Attributes:
        is_first: Whether this is the agent that decides; the others follow it.
        machine: The number of this agent's machine.
        is_first_on_machine: Whether no other agent of the machine has a lower number.
        num_ranks: Ranks that all agents can start together.
    """

    def __init__(self, *, ranks_per_device: int) -> None:
        """Joins the agents. A machine without GPUs counts as one device for each agent."""
        under_torchrun = "RANK" in os.environ
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        dist.init_process_group("gloo", timeout=timedelta(hours=1))
        self.is_first = dist.get_rank() == 0
        node = Node.of_environment()
        self.machine = node.number
        local = int(os.environ["LOCAL_RANK"])
        self.is_first_on_machine = local == 0
        self._has_gpus = torch.cuda.is_available()
        devices = [local]
        if self._has_gpus and not under_torchrun:
            devices = list(range(torch.cuda.device_count()))
        self._device_of = [device for device in devices for _ in range(ranks_per_device)]
        self._shares_gpu = self._has_gpus and ranks_per_device > 1
        self._local_agents = node.num_ranks
        self.num_ranks = dist.get_world_size() * len(self._device_of)
        # For the word that a launch has failed.
        address = os.environ["MASTER_ADDR"]
        store = (
            dist.TCPStore(address, 0, None, True, wait_for_workers=False) if self.is_first else None
        )
        port = [store.port if store else 0]
        dist.broadcast_object_list(port, src=0)
        self._store = store or dist.TCPStore(address, port[0], None, False)
        self._launches = 0

    def close(self) -> None:
        """Lets the agents that follow go; every agent calls it."""
        if self.is_first:
            dist.broadcast_object_list([None], src=0)
        dist.destroy_process_group()

    def follow(self, models: Path) -> None:
        """Starts ranks as the first agent says, until it closes."""
        while True:
            message: list[_Launch | None] = [None]
            dist.broadcast_object_list(message, src=0)
            if message[0] is None:
                return
            self._run_ranks(message[0], models)

    def run(self, cases: Sequence[Case], *, models: Path, folder: Path, end: float) -> list[Result]:
        """Runs cases of one number of ranks until ``end`` (`time.monotonic`); on the first agent.

        Ranks start once for all cases, and again after a case that ended or blocked a rank.
        """
        todo, results = list(cases), []
        while todo:
            if time.monotonic() > end:
                results += [Result.of(one, Status.NOT_RUN, "no time was left") for one in todo]
                break
            # As torchrun's agents do, this one has the stores of the ranks: no port is chosen
            # before it is listened on.
            stores = [
                dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) for _ in todo
            ]
            launch = _Launch(
                number=self._launches,
                cases=todo,
                ports=[store.port for store in stores],
                num_ranks=todo[0].num_ranks,
                folder=str(folder),
            )
            self._launches += 1
            dist.broadcast_object_list([launch], src=0)
            failure = self._run_ranks(launch, models, end=end)
            done = _read_results(_results_file(launch))
            results += [
                Result.of(one, Status(line["status"]), line["found"], line["seconds"])
                for one, line in zip(todo, done, strict=False)
            ]
            todo = todo[len(done) :]
            if failure is not None and todo:
                results.append(Result.of(todo.pop(0), Status.FAILED, failure))
            assert failure is not None or not todo, "the ranks ended without results"
        return results

    def _run_ranks(self, launch: _Launch, models: Path, *, end: float | None = None) -> str | None:
        """Runs this agent's ranks until all ranks have ended; returns what failed, if anything."""
        logs = Path(launch.folder) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        job = logs / f"job_{launch.number}_{dist.get_rank()}.json"
        job.write_text(
            json.dumps(
                {
                    "cases": [dataclasses.asdict(case) for case in launch.cases],
                    "ports": launch.ports,
                    "results": str(_results_file(launch)),
                    "models": str(models),
                    "folder": launch.folder,
                }
            )
        )
        failed = f"failed_{launch.number}"
        ranks = self._start(launch, job, logs)
        watch = _Watch(launch, end) if self.is_first else None
        ended, have_ended = f"ended_{launch.number}", False
        while not self._store.check([failed]):
            codes = {rank: process.poll() for rank, (process, _) in ranks.items()}
            if any(codes.values()):
                # The rank that failed first makes others fail, which may be seen before it.
                time.sleep(_SECONDS_AFTER_A_FAILURE)
                if not self._store.check([failed]):
                    self._store.set(failed, _failures(ranks))
                break
            if not have_ended and all(code == 0 for code in codes.values()):
                have_ended = True
                self._store.add(ended, 1)
            if watch is None:
                if have_ended:
                    break
            elif late := watch.late():
                self._store.set(failed, late)
            # The first agent waits for the others' ranks, which may hang.
            elif have_ended and self._store.add(ended, 0) == dist.get_world_size():
                break
            time.sleep(_POLL_SECONDS)
        for process, _ in ranks.values():
            process.kill()
            process.wait()
        dist.barrier()
        return self._store.get(failed).decode() if self._store.check([failed]) else None

    def _start(
        self, launch: _Launch, job: Path, logs: Path
    ) -> dict[int, tuple[subprocess.Popen, Path]]:
        """This agent's ranks of a launch, with their logs."""
        first = dist.get_rank() * len(self._device_of)
        on_machine = self._local_agents * len(self._device_of)
        first_on_machine = first - first % on_machine
        started = {}
        for rank, device in enumerate(self._device_of, start=first):
            if rank >= launch.num_ranks:
                break
            log = logs / f"launch_{launch.number}_rank_{rank}.log"
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(launch.num_ranks),
                "LOCAL_RANK": str(device if self._has_gpus else rank - first_on_machine),
                "LOCAL_WORLD_SIZE": str(min(on_machine, launch.num_ranks - first_on_machine)),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                # Rounding to TF32 would hide what a layout changes.
                "NVIDIA_TF32_OVERRIDE": "0",
                "CUDA_DEVICE_MAX_CONNECTIONS": "1",
                **(_SHARED_GPU | {"NCCL_HOSTID": f"rank{rank}"} if self._shares_gpu else {}),
            }
            with log.open("w") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "megatron_oprd.selftest.worker", str(job)],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            started[rank] = process, log
        return started


class _Watch:
    """Watches that each case of a launch ends in its time."""

    def __init__(self, launch: _Launch, end: float | None) -> None:
        self._launch, self._end = launch, end
        self._done, self._since = 0, time.monotonic()

    def late(self) -> str | None:
        """What has taken too long, if anything has."""
        now = time.monotonic()
        done = len(_read_results(_results_file(self._launch)))
        if done > self._done:
            self._done, self._since = done, now
        cases = self._launch.cases
        limit = cases[done].seconds if done < len(cases) else _SECONDS_TO_END
        # The first case has the imports in front of it.
        if now - self._since > limit + (0 if done else SECONDS_TO_START):
            return f"no end after {limit:.0f} seconds (logs: {self._launch.folder}/logs)"
        if self._end is not None and now > self._end:
            return "the self-test's time was over"
        return None


def _results_file(launch: _Launch) -> Path:
    return Path(launch.folder) / "logs" / f"results_{launch.number}.jsonl"


def _read_results(file: Path) -> list[dict]:
    if not file.exists():
        return []
    # A line without its end is being written.
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def _failures(ranks: dict[int, tuple[subprocess.Popen, Path]]) -> str:
    """The last line that names an exception, of each rank that failed, and where the logs are."""
    found = []
    for rank, (process, log) in ranks.items():
        if process.poll():
            lines = log.read_text(errors="replace").splitlines()
            errors = [line for line in lines if "Error" in line or "error:" in line]
            last = (errors or lines or [""])[-1][:300]
            found.append(f"rank {rank}: exit code {process.returncode}, {last} ({log})")
    return "; ".join(found)
