"""Where a run starts its vLLM server: on which address, and on which GPUs."""

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_oprd.errors import UserError

LOOPBACK = "127.0.0.1"
_SETTING = "rollout.vllm.server_gpus"


def server_host() -> str:
    """The address on which all ranks reach the machine of global rank 0.

    Loopback where all ranks are on that machine, so that nobody else reaches the server; else what
    ``MASTER_ADDR``, which is that machine, means on the others. Every rank has to call, with the
    default process group.
    """
    master = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_STREAM)
    own = (_network(), str(master[0][4][0]))
    everyone: list[tuple[str, str]] = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return host_of(everyone)


def host_of(ranks: Sequence[tuple[str, str]]) -> str:
    """The address of the first rank's machine.

    Args:
        ranks: Of each rank what tells its network from others (ranks with the same one share a
            loopback device), and what it takes for the first rank's address.
    """
    first, _ = ranks[0]
    return next((address for network, address in ranks if network != first), LOOPBACK)


def _network() -> str:
    """Tells this process's network (a machine's, or a container's) from others."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/net').stat().st_ino}"


def check_server_gpus(gpus: Sequence[int], *, ranks_on_host: int) -> None:
    """Refuses GPUs for the server that are not there, or that ranks train on.

    Called on global rank 0, whose machine the server is on; local rank i has the i-th GPU that is
    visible to it.

    Args:
        gpus: ``rollout.vllm.server_gpus``.
        ranks_on_host: Ranks on this machine.

    Raises:
        UserError: There is such a GPU, or none where one is needed.
    """
    found = f"{_SETTING} = {list(gpus)}"
    if not torch.cuda.is_available():
        if gpus:
            raise UserError(f"{found}: there is no GPU here; leave it out")
        return
    try:
        table = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{found}: nvidia-smi, which counts GPUs, does not run: {error}") from error
    trained_on = [str(torch.cuda.get_device_properties(i).uuid) for i in range(ranks_on_host)]
    check_gpus(gpus, table, trained_on)


def check_gpus(gpus: Sequence[int], table: str, trained_on: Sequence[str]) -> None:
    """Does what `check_server_gpus` does.

    Args:
        gpus: ``rollout.vllm.server_gpus``.
        table: nvidia-smi's lines of index and UUID.
        trained_on: The UUIDs of the GPUs that ranks have.

    Raises:
        UserError: See `check_server_gpus`.
    """
    rows = [line.split(",") for line in table.splitlines()]
    uuids = {int(index): uuid.strip().removeprefix("GPU-") for index, uuid in rows}
    taken = {uuid.removeprefix("GPU-") for uuid in trained_on}
    free = [index for index, uuid in uuids.items() if uuid not in taken]
    found = f"{_SETTING} = {list(gpus)}"
    right = f"free for a server here are {free}" if free else "no GPU is left for a server here"
    if not gpus:
        raise UserError(f"rollout.vllm.start_server needs {_SETTING}: {right}")
    for gpu in gpus:
        if gpu not in uuids:
            raise UserError(f"{found}: there is no GPU {gpu} here (nvidia-smi); {right}")
        if uuids[gpu] in taken:
            raise UserError(f"{found}: a rank trains on GPU {gpu}; {right}")
