"""vLLM's engines for the replicas of a run, and the server that they may share."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_oprd.config.schema import RolloutConfig
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.engine import RolloutEngine, RolloutEngineError
from megatron_oprd.rollout.gpus import engine_gpus
from megatron_oprd.rollout.replicas import EngineStarter
from megatron_oprd.rollout.served_model import ServedModel
from megatron_oprd.rollout.vllm.engine import VLLMEngine
from megatron_oprd.rollout.vllm.launch import ServerProcess, server_host
from megatron_oprd.rollout.vllm.server import VLLMServerEngine

LOG = "vllm_server.log"


@contextlib.contextmanager
def open_vllm(
    rollout: RolloutConfig, model: ServedModel, context: ParallelContext, *, log_prefix: str
) -> Iterator[EngineStarter]:
    """Finds the engines' GPUs, or starts the server; ends the server. Every rank has to call.

    Raises:
        UserError: See `engine_gpus`.
        RolloutEngineError: An engine failed inside the block; with the path of the server's log.
    """
    vllm = rollout.vllm
    gpus: list[str] = []
    if not vllm.uses_server:
        gpus = engine_gpus(
            context,
            size=vllm.tensor_model_parallel_size,
            setting="rollout.vllm.tensor_model_parallel_size",
        )
    with contextlib.ExitStack() as stack:
        server = None
        if vllm.start_server:
            log, host = Path(f"{log_prefix}{LOG}"), server_host()
            stack.enter_context(_naming(log))
            if context.rank == 0:
                log.parent.mkdir(parents=True, exist_ok=True)
                server = ServerProcess(
                    model.folder,
                    dtype=model.dtype,
                    max_model_len=model.max_model_len,
                    host=host,
                    log=log,
                    config=vllm,
                )
                stack.enter_context(contextlib.closing(server))
            # Rank 0 starts the server and tells the others its address.
            url: list[str | None] = [None if server is None else server.url]
            dist.broadcast_object_list(url, src=0)
            vllm = dataclasses.replace(vllm, server_url=url[0])
        with_url = dataclasses.replace(rollout, vllm=vllm)
        yield EngineStarter(
            create=lambda: create_vllm(with_url, model, device=context.device, gpus=gpus),
            max_restarts=vllm.max_restarts,
            max_restarts_setting="rollout.vllm.max_restarts",
            is_shared=vllm.uses_server,
            ensure_server=None if server is None else server.ensure,
        )


def create_vllm(
    rollout: RolloutConfig, model: ServedModel, *, device: torch.device, gpus: Sequence[str] = ()
) -> RolloutEngine:
    """Creates an engine on the server of ``server_url``, or on these GPUs if there is none."""
    vllm = rollout.vllm
    if vllm.server_url is not None:
        return VLLMServerEngine(
            model.folder,
            dtype=model.dtype,
            eos_token_ids=model.eos_token_ids(),
            known_ids=model.known_ids(),
            decode=model.decode,
            max_batch_size=rollout.max_batch_size,
            owner=model.owner,
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
def _naming(log: Path) -> Iterator[None]:
    """Adds the path of the server's log to an engine's error."""
    try:
        yield
    except RolloutEngineError as error:
        raise RolloutEngineError(f"{error}\nthe vLLM server's output is in {log}") from error
