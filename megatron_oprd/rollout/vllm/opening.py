"""vLLM's engines of a run, and the servers that they may share."""

import contextlib
import dataclasses
import functools
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.config.schema import RolloutConfig
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.parallel.node import Node
from megatron_oprd.rollout.engine import RolloutEngine, RolloutEngineError
from megatron_oprd.rollout.gpus import engine_places, leaders
from megatron_oprd.rollout.recovery import EngineStarter
from megatron_oprd.rollout.served_model import ServedModel
from megatron_oprd.rollout.vllm.engine import VLLMEngine
from megatron_oprd.rollout.vllm.launch import ServerProcess
from megatron_oprd.rollout.vllm.secret import VARIABLE
from megatron_oprd.rollout.vllm.server_place import server_host, servers_of
from megatron_oprd.rollout.vllm.servers import VLLMServersEngine


@contextlib.contextmanager
def open_vllm(
    rollout: RolloutConfig, model: ServedModel, context: ParallelContext, *, log_prefix: str
) -> Iterator[EngineStarter]:
    """Finds the engines' GPUs, or starts the servers; ends the servers. Every rank has to call.

    Raises:
        UserError: See `engine_places`.
        RolloutEngineError: An engine failed inside the block; with the paths of the servers' logs.
    """
    vllm = rollout.vllm
    starter = functools.partial(
        EngineStarter,
        max_restarts=vllm.max_restarts,
        max_restarts_setting="rollout.vllm.max_restarts",
    )
    if not vllm.uses_server:
        places = engine_places(
            context,
            size=vllm.tensor_model_parallel_size,
            setting="rollout.vllm.tensor_model_parallel_size",
        )
        gpus = next((place.gpus for place in places if place.owner == context.rank), ())
        yield starter(
            owners=[place.owner for place in places],
            create=lambda: create_vllm(rollout, model, device=context.device, gpus=gpus),
        )
        return
    with contextlib.ExitStack() as stack:
        started: list[ServerProcess] = []
        if vllm.start_servers:
            started = _own_servers(vllm, model, stack, log_prefix=log_prefix)
            vllm = dataclasses.replace(vllm, servers=_urls(started))
        with_urls = dataclasses.replace(rollout, vllm=vllm)

        def begin() -> None:
            for server in started:
                server.begin()

        def ensure() -> None:
            begin()  # all at the same time
            for server in started:
                server.ensure()

        owners = leaders(context)
        watches = context.rank == owners[0]
        yield starter(
            owners=owners,
            create=lambda: create_vllm(with_urls, model, device=context.device, watches=watches),
            is_shared=True,
            ensure_server=ensure if started else None,
            revive_servers=begin if started else None,
        )
        if vllm.start_servers:
            # Rank 0's engine, closed by now, had connections with all nodes' servers.
            dist.barrier(context.control)


def _own_servers(
    vllm: VLLMConfig, model: ServedModel, stack: contextlib.ExitStack, *, log_prefix: str
) -> list[ServerProcess]:
    """The servers that this rank starts, not started yet; collective over the default group.

    The first rank of each node of ``server_nodes`` has some. Every rank gets the run's secret.
    """
    host = server_host()
    secret = [secrets.token_hex()]
    dist.broadcast_object_list(secret, src=0)
    # Also the environment of the servers' processes.
    os.environ[VARIABLE] = secret[0]
    logs = [Path(f"{log_prefix}vllm_server_{i}.log") for i in range(vllm.start_servers)]
    stack.enter_context(_naming(logs))
    node = Node.of_environment()
    if not node.is_first_rank:
        return []
    servers = []
    for number, gpus in servers_of(vllm, node.number).items():
        logs[number].parent.mkdir(parents=True, exist_ok=True)
        server = ServerProcess(
            model.folder,
            dtype=model.dtype,
            max_model_len=model.max_model_len,
            host=host,
            gpus=gpus,
            log=logs[number],
            config=vllm,
        )
        stack.enter_context(contextlib.closing(server))
        servers.append(server)
    return servers


def _urls(started: Sequence[ServerProcess]) -> list[str]:
    """URLs of all ranks' servers, in their order; collective over the default group."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [server.url for server in started])
    return [url for of_rank in everyone for url in of_rank]


def create_vllm(
    rollout: RolloutConfig,
    model: ServedModel,
    *,
    device: torch.device,
    gpus: Sequence[str] = (),
    watches: bool = False,
) -> RolloutEngine:
    """Creates an engine on the servers of the settings, or on these GPUs if there are none.

    With ``watches`` it tells how full the servers are.
    """
    vllm = rollout.vllm
    if vllm.servers:
        return VLLMServersEngine(
            model.folder,
            dtype=model.dtype,
            eos_token_ids=model.eos_token_ids(),
            known_ids=model.known_ids(),
            decode=model.decode,
            max_batch_size=rollout.max_batch_size,
            owner=model.owner,
            swaps=rollout.steps_ahead > 1,
            watches=watches,
            config=vllm,
        )
    return VLLMEngine(
        model.folder,
        dtype=model.dtype,
        device=device,
        gpus=gpus,
        eos_token_ids=model.eos_token_ids(),
        known_ids=model.known_ids(),
        decode=model.decode,
        max_model_len=model.max_model_len,
        max_batch_size=rollout.max_batch_size,
        config=vllm,
    )


@contextlib.contextmanager
def _naming(logs: Sequence[Path]) -> Iterator[None]:
    """Adds the paths of the servers' logs to an engine's error."""
    try:
        yield
    except RolloutEngineError as error:
        files = ", ".join(map(str, logs))
        raise RolloutEngineError(f"{error}\nthe vLLM servers' output is in {files}") from error
