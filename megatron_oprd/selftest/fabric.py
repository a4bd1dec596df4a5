"""How fast collectives are between all ranks and within a machine; over what NCCL sends."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_oprd.config.schema import ParallelConfig
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.parallel.node import Node
from megatron_oprd.selftest.cases import CaseSkippedError, CaseWarning, Place

_REPEATS = 5
_MIB = 2**20


def run(arguments: dict[str, Any], place: Place) -> str:
    """Runs a case: {mib}, the size of the tensors in MiB.

    Raises:
        CaseWarning: NCCL uses TCP although the machine has InfiniBand or RoCE devices.
    """
    if os.environ["WORLD_SIZE"] == "1":
        raise CaseSkippedError("one rank sends nothing")
    log = place.folder / "logs" / "nccl"
    log.mkdir(parents=True, exist_ok=True)
    # Read by NCCL when it starts.
    os.environ |= {
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "INIT,NET",
        "NCCL_DEBUG_FILE": str(log / f"rank_{os.environ['RANK']}.log"),
    }
    with parallel_run(ParallelConfig(), seed=0) as context:
        count, device = dist.get_world_size(), context.device
        numbers = torch.ones(arguments["mib"] * _MIB // 4, device=device)
        reduce = _seconds(lambda: dist.all_reduce(numbers))
        part = torch.ones(len(numbers) // count, device=device)
        whole = torch.empty(len(part) * count, device=device)
        gather = _seconds(lambda: dist.all_gather_into_tensor(whole, part))
        local = Node.of_environment().num_ranks
        inside = ""
        if 1 < local < count:
            of_machine, _ = dist.new_subgroups(local)
            seconds = _seconds(lambda: dist.all_reduce(numbers, group=of_machine))
            inside = f"; within a machine all-reduce {2 * _sent(numbers, local) / seconds:.2f} GB/s"
        is_nccl = dist.get_backend() == "nccl"
    found = (
        f"all-reduce {2 * _sent(numbers, count) / reduce:.2f} GB/s, all-gather "
        f"{_sent(numbers, count) / gather:.2f} GB/s{inside} ({arguments['mib']} MiB)"
    )
    if not is_nccl:
        return f"{found}, gloo"
    transports = _transports(log)
    found = f"{found}, NCCL over {', '.join(transports) or 'an unknown transport'}"
    if any("Socket" in one for one in transports) and (devices := _infiniband_devices()):
        raise CaseWarning(
            f"{found}: NCCL sends over TCP, but this machine has {', '.join(devices)}; look at "
            f"NCCL_IB_HCA, NCCL_SOCKET_IFNAME and {log}"
        )
    return found


def _sent(numbers: torch.Tensor, count: int) -> float:
    """GB that each of ``count`` ranks sends in a ring's gather: its part, count - 1 times.

    A sum is as much again.
    """
    return numbers.nbytes / count * (count - 1) / 1e9


def _seconds(collective: Callable[[], object]) -> float:
    """Of one call, after one that warms up."""
    collective()
    dist.barrier()
    _wait()
    start = time.perf_counter()
    for _ in range(_REPEATS):
        collective()
    _wait()
    return (time.perf_counter() - start) / _REPEATS


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _transports(log: Path) -> list[str]:
    """What NCCL says that its channels go over, as in ``P2P/CUMEM`` or ``NET/IB``."""
    found = set()
    for file in log.glob("*.log"):
        found |= set(re.findall(r" via ((?:P2P|SHM|NET)/\w+)", file.read_text(errors="replace")))
    return sorted(found)


def _infiniband_devices() -> list[str]:
    """InfiniBand and RoCE devices of this machine."""
    folder = Path("/sys/class/infiniband")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
