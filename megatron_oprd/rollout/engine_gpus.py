"""Which GPUs an engine runs on that has several."""

import os
import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_oprd.errors import UserError
from megatron_oprd.parallel import ParallelContext


def visible_gpus(device: torch.device, *, size: int) -> list[str]:
    """A device of this process and those behind it, as CUDA_VISIBLE_DEVICES names them.

    Args:
        device: The first; a CPU has none.
        size: How many.

    Raises:
        UserError: There are fewer.
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


def engine_gpus(context: ParallelContext, *, size: int) -> list[str]:
    """The GPUs of a replica's engine: those of its first ranks on its leader's machine.

    Every rank of the replica has to call; they talk on ``context.replica_control``.

    Args:
        context: This rank's place.
        size: How many.

    Returns:
        Their names for CUDA_VISIBLE_DEVICES, the leader's first; none on a CPU.

    Raises:
        UserError: The replica has fewer ranks on that machine; on every rank of it.
    """
    places: list[tuple[str, list[str]]] = [("", [])] * context.replica_control.size()
    own = (socket.gethostname(), visible_gpus(context.device, size=1))
    dist.all_gather_object(places, own, group=context.replica_control)
    return gpus_beside_the_first(places, size=size)


def gpus_beside_the_first(places: Sequence[tuple[str, list[str]]], *, size: int) -> list[str]:
    """The GPUs of the first ranks on the first one's host; of each rank its host and GPU.

    Raises:
        UserError: They are fewer.
    """
    host, _ = places[0]
    beside = [gpu for of_rank, gpu in places if of_rank == host]
    if len(beside) < size:
        raise UserError(
            f"rollout.vllm.tensor_model_parallel_size = {size}: an engine runs on the GPUs of its "
            f"replica's ranks on one machine, and {host} has {len(beside)} of them; give at most "
            "that"
        )
    return [name for gpu in beside[:size] for name in gpu]
