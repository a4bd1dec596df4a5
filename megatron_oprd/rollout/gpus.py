"""The GPUs of an engine in processes of its own."""

import os
import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_oprd.errors import UserError
from megatron_oprd.parallel.context import ParallelContext


def visible_gpus(device: torch.device, *, size: int) -> list[str]:
    """Names of ``device`` and the following devices for CUDA_VISIBLE_DEVICES; empty on a CPU.

    Raises UserError if there are fewer than ``size``.
    """
    if device.type != "cuda":
        return []
    index = device.index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(torch.cuda.device_count())]
    if visible is not None:
        names = visible.split(",")
    if len(found := names[index : index + size]) < size:
        raise UserError(
            f"--tensor-model-parallel-size {size}: {len(found)} GPUs are there from {device} on"
        )
    return found


def engine_gpus(context: ParallelContext, *, size: int, setting: str) -> list[str]:
    """The GPUs of a replica's engine: its first ranks' GPUs on the leader's machine.

    Collective over the replica (``context.replica_control``). Returns ``size`` names for
    CUDA_VISIBLE_DEVICES, the leader's first; empty on a CPU. Raises UserError on every rank of the
    replica if it has fewer ranks on that machine than ``setting`` asks for.
    """
    places: list[tuple[str, list[str]]] = [("", [])] * context.replica_control.size()
    own = (socket.gethostname(), visible_gpus(context.device, size=1))
    dist.all_gather_object(places, own, group=context.replica_control)
    return gpus_beside_the_first(places, size=size, setting=setting)


def gpus_beside_the_first(
    places: Sequence[tuple[str, list[str]]], *, size: int, setting: str
) -> list[str]:
    """The GPUs of the first ``size`` ranks on the first rank's host; UserError if there are fewer.

    ``places`` has host and GPU names of each rank.
    """
    host, _ = places[0]
    beside = [gpu for of_rank, gpu in places if of_rank == host]
    if len(beside) < size:
        raise UserError(
            f"{setting} = {size}: an engine runs on the GPUs of its "
            f"replica's ranks on one machine, and {host} has {len(beside)} of them; give at most "
            "that"
        )
    return [name for gpu in beside[:size] for name in gpu]
