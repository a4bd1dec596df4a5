"""Where the servers of a run are: their nodes, addresses and GPUs."""

import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.errors import UserError
from megatron_oprd.parallel.node import Node

LOOPBACK = "127.0.0.1"
_GPUS, _NODES = "rollout.vllm.server_gpus", "rollout.vllm.server_nodes"
_ANY_PORT = 9  # nothing is sent there


def servers_of(vllm: VLLMConfig, node: int) -> dict[int, list[int]]:
    """Numbers of the servers that a node starts, with the GPUs of each (none on a CPU)."""
    if node not in vllm.server_nodes:
        return {}
    size = vllm.tensor_model_parallel_size
    first = sorted(vllm.server_nodes).index(node) * vllm.servers_per_node
    return {
        first + place: vllm.server_gpus[place * size : (place + 1) * size]
        for place in range(vllm.servers_per_node)
    }


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a rank sees of the network."""

    network: str  # an id of its own: equal ids share a loopback device
    first: str  # address of the node of global rank 0


def server_host() -> str:
    """Returns the address under which all ranks reach this rank's node.

    Loopback if all ranks share a network, so that no server is reachable from outside. Otherwise
    what ``MASTER_ADDR`` is for the other nodes, or another node's own address on the way there.
    Collective over the default group.
    """
    first = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_STREAM)[0][4][0]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, Seen(network=_network(), first=str(first)))
    return host_of(everyone, dist.get_rank())


def host_of(ranks: Sequence[Seen], rank: int) -> str:
    """Returns the address of the node of ``rank``, this rank; ``ranks`` has what each sees."""
    of_first, own = ranks[0].network, ranks[rank]
    others = [one.first for one in ranks if one.network != of_first]
    if not others:
        return LOOPBACK
    if own.network != of_first:
        return address_towards(own.first)
    # Another node's view: on its own node, MASTER_ADDR may resolve to loopback.
    return others[0]


def address_towards(address: str) -> str:
    """This node's address on the way to another one's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect((address, _ANY_PORT))  # chooses the way and sends nothing
        return way.getsockname()[0]


def _network() -> str:
    """An id of this process's network: of a machine or of a container on it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/net').stat().st_ino}"


def check_servers(vllm: VLLMConfig, node: Node) -> None:
    """Checks the servers that the run starts on this node, before anything is loaded.

    Local rank i trains on the i-th visible GPU. Raises UserError if ``server_nodes`` names a node
    that the run does not have, a GPU is missing or trained on, or none is given although the node
    has GPUs.
    """
    if (last := max(vllm.server_nodes)) >= node.count:
        raise UserError(
            f"{_NODES} = {vllm.server_nodes}: there is no node {last}; torchrun counts "
            f"{node.count} from 0 (--nnodes)"
        )
    if node.number not in vllm.server_nodes:
        return
    gpus = vllm.server_gpus
    found = f"{_GPUS} = {gpus}"
    if not torch.cuda.is_available():
        if gpus:
            raise UserError(f"{found}: there is no GPU on node {node.number}; leave it out")
        return
    try:
        table = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"{found}: nvidia-smi, which counts GPUs, does not run on node {node.number}: {error}"
        ) from error
    trained_on = [str(torch.cuda.get_device_properties(i).uuid) for i in range(node.num_ranks)]
    check_gpus(gpus, table, trained_on, node=node.number)


def check_gpus(gpus: Sequence[int], table: str, trained_on: Sequence[str], *, node: int) -> None:
    """Checks the GPUs of servers on a node, whose ranks train on GPUs with these UUIDs.

    ``table`` is nvidia-smi's output: lines of index and UUID. Raises UserError.
    """
    rows = [line.split(",") for line in table.splitlines()]
    uuids = {int(index): uuid.strip().removeprefix("GPU-") for index, uuid in rows}
    taken = {uuid.removeprefix("GPU-") for uuid in trained_on}
    free = [index for index, uuid in uuids.items() if uuid not in taken]
    found = f"{_GPUS} = {list(gpus)}"
    right = f"free for servers there are {free}" if free else "no GPU is left for a server there"
    if not gpus:
        raise UserError(f"rollout.vllm.start_servers on node {node} needs {_GPUS}: {right}")
    for gpu in gpus:
        if gpu not in uuids:
            raise UserError(f"{found}: node {node} has no GPU {gpu} (nvidia-smi); {right}")
        if uuids[gpu] in taken:
            raise UserError(f"{found}: a rank trains on GPU {gpu} of node {node}; {right}")
