"""A run's prompts, the teacher of each prompt, and the engines that generate responses."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.data.benchmarks import tokenized
from megatron_oprd.models.build import DTYPES
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.create import create_engine
from megatron_oprd.rollout.engine import RolloutEngine, RolloutEngineError, SamplingParams
from megatron_oprd.rollout.replicas import ReplicaEngines
from megatron_oprd.rollout.vllm.client import check_server
from megatron_oprd.rollout.vllm.engine import engine_gpus
from megatron_oprd.rollout.vllm.launch import ServerProcess, check_server_gpus, server_host
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.training.reading import chat_format_of_benchmarks


@contextlib.contextmanager
def open_engines(
    plan: RunPlan,
    context: ParallelContext,
    stream: Callable[[bool], Iterator[tuple[str, Tensor | None]]],
    *,
    frozen: Collection[str] = (),
    server_log: Path,
) -> Iterator[ReplicaEngines]:
    """The run's rollout engines, without weights; closed at the end. Every rank has to call.

    Args:
        plan: The run.
        context: This rank's place.
        stream: Streams the weights for every sync, see `ReplicaEngines`.
        frozen: Names of the weights that never change.
        server_log: Gets the output of the vLLM server, if the run starts one.

    Raises:
        UserError: See `engine_gpus`.
        RolloutEngineError: An engine did not start, or failed too often inside the block.
    """
    config = plan.config
    folder = plan.student_checkpoint.hf_folder
    dtype = DTYPES[config.model.params_dtype]
    max_model_len = _max_model_len(plan)
    vllm = config.rollout.vllm
    gpus: list[str] = []
    if not vllm.uses_server:
        gpus = engine_gpus(context, size=vllm.tensor_model_parallel_size)
    with contextlib.ExitStack() as stack:
        server = None
        if vllm.start_server:
            host = server_host()
            stack.enter_context(_naming(server_log))
            if context.rank == 0:
                server_log.parent.mkdir(parents=True, exist_ok=True)
                server = ServerProcess(
                    folder,
                    dtype=dtype,
                    max_model_len=max_model_len,
                    host=host,
                    log=server_log,
                    config=vllm,
                )
                stack.enter_context(contextlib.closing(server))
            # Rank 0 starts the server and tells the others its address.
            url: list[str | None] = [None if server is None else server.url]
            dist.broadcast_object_list(url, src=0)
            vllm = dataclasses.replace(vllm, server_url=url[0])

        def create() -> RolloutEngine:
            return create_engine(
                config.rollout.engine,
                folder,
                plan.tokenizer,
                dtype=dtype,
                device=context.device,
                gpus=gpus,
                max_batch_size=config.rollout.max_batch_size,
                max_model_len=max_model_len,
                vllm=vllm,
                owner=str(Path(config.output_dir).absolute()),
            )

        engines = ReplicaEngines(
            create,
            stream,
            frozen=frozen,
            max_restarts=vllm.max_restarts,
            is_shared=vllm.uses_server,
            ensure_server=None if server is None else server.ensure,
            context=context,
        )
        stack.enter_context(contextlib.closing(engines))
        yield engines


@contextlib.contextmanager
def _naming(log: Path) -> Iterator[None]:
    """Adds the path of the server's log to an engine's error."""
    try:
        yield
    except RolloutEngineError as error:
        raise RolloutEngineError(f"{error}\nthe vLLM server's output is in {log}") from error


def check_rollout_server(plan: RunPlan) -> None:
    """Checks the vLLM server that the run's rollouts come from, if any; see `check_server`."""
    vllm = plan.config.rollout.vllm
    if vllm.server_url is not None:
        check_server(
            vllm.server_url,
            plan.student_checkpoint.hf_folder,
            dtype=DTYPES[plan.config.model.params_dtype],
            max_model_len=_max_model_len(plan),
            checks_weights=vllm.check_weights_interval is not None,
        )


def check_server_to_start(plan: RunPlan, *, ranks_on_host: int) -> None:
    """Checks the GPUs of a vLLM server that the run starts; on rank 0. See `check_server_gpus`."""
    vllm = plan.config.rollout.vllm
    if vllm.start_server:
        check_server_gpus(vllm.server_gpus, ranks_on_host=ranks_on_host)


def _max_model_len(plan: RunPlan) -> int:
    """Tokens of the longest prompt with its response, in training or evaluation."""
    if (given := plan.config.rollout.vllm.max_model_len) is not None:
        return given
    of_benchmarks = [
        len(prompt.token_ids) + plan.config.evaluation.max_new_tokens
        for benchmark in plan.benchmarks
        for prompt in tokenized(benchmark, plan.tokenizer, chat_format_of_benchmarks(plan.config))
    ]
    return max([plan.layout.max_sequence_length, *of_benchmarks])


def compares_logprobs(step: int, config: RunConfig) -> bool:
    """Whether a step's rollouts are checked against the trainer's log-probabilities."""
    interval = config.rollout.logprob_check_interval
    return interval is not None and step % interval == 0


def sampling_of_step(step: int, config: RunConfig) -> SamplingParams:
    """The sampling parameters of one step."""
    rollout = config.rollout
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=tuple(rollout.stop),
        stop_token_ids=tuple(rollout.stop_token_ids),
        max_new_tokens=rollout.max_new_tokens,
        samples_per_prompt=rollout.samples_per_prompt,
        # So that a prompt gets other responses in a later epoch.
        seed=config.seed + step,
        logprobs=compares_logprobs(step, config),
    )
