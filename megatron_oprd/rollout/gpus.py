"""The GPUs of engines, and the ranks that control them."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class EnginePlace:
    """Where an engine runs.

    Attributes:
        owner: Global rank that controls it, the first of its ranks.
        gpus: Its GPUs' names for CUDA_VISIBLE_DEVICES, the owner's first; empty on a CPU.
    """

    owner: int
    gpus: tuple[str, ...]


def engine_places(context: ParallelContext, *, size: int, setting: str) -> list[EnginePlace]:
    """Divides all GPUs of the run into engines of ``size`` GPUs, each on one machine.

    Collective (``context.control``); the same on every rank. Raises UserError on every rank if a
    machine's ranks do not divide into engines; ``setting`` is the size's name.
    """
    found: list[Any] = [None] * context.control.size()
    own = (socket.gethostname(), visible_gpus(context.device, size=1))
    dist.all_gather_object(found, own, group=context.control)
    return divide_gpus(found, size=size, setting=setting)


def divide_gpus(
    ranks: Sequence[tuple[str, list[str]]], *, size: int, setting: str
) -> list[EnginePlace]:
    """Engines over consecutive ranks of each machine; UserError if ``size`` does not divide them.

    ``ranks`` has host and GPU names of each rank.
    """
    of_host: dict[str, list[int]] = {}
    for rank, (host, _) in enumerate(ranks):
        of_host.setdefault(host, []).append(rank)
    places = []
    for host, own in of_host.items():
        check_divides_host(len(own), size=size, setting=setting, host=host)
        for first in range(0, len(own), size):
            members = own[first : first + size]
            gpus = tuple(name for rank in members for name in ranks[rank][1])
            places.append(EnginePlace(owner=members[0], gpus=gpus))
    return sorted(places, key=lambda place: place.owner)


def check_divides_host(num_ranks: int, *, size: int, setting: str, host: str = "") -> None:
    """Raises UserError if engines of ``size`` GPUs do not divide a machine's ranks."""
    if num_ranks % size:
        raise UserError(
            f"{setting} = {size}: the ranks of a machine are divided into engines of as many GPUs, "
            f"and {host or 'this machine'} has {num_ranks} ranks; give a number that divides them"
        )


def leaders(context: ParallelContext) -> list[int]:
    """Global rank of each data-parallel replica's first rank. Collective (``context.control``)."""
    found: list[Any] = [None] * context.control.size()
    dist.all_gather_object(found, context.is_leader, group=context.control)
    return [rank for rank, is_leader in enumerate(found) if is_leader]
