"""The engines of a run, and its sampling parameters."""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.data.benchmarks import tokenized
from megatron_oprd.models.build import DTYPES
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.parallel.node import Node
from megatron_oprd.rollout.engine import SamplingParams
from megatron_oprd.rollout.pool import EnginePool
from megatron_oprd.rollout.recovery import WeightStream
from megatron_oprd.rollout.registry import engine_kind
from megatron_oprd.rollout.served_model import ServedModel
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.training.reading import chat_format_of_benchmarks


@contextlib.contextmanager
def open_engines(
    plan: RunPlan,
    context: ParallelContext,
    stream: WeightStream,
    *,
    frozen: Collection[str] = (),
    log_prefix: str,
) -> Iterator[EnginePool]:
    """The run's rollout engines, without weights; closed at the end. Every rank has to call.

    Args:
        plan: The run.
        context: This rank's place.
        stream: Streams the weights for every sync.
        frozen: Names of the weights that never change.
        log_prefix: Start of the path of a file with the engine's output, if it has one.

    Raises:
        UserError: The ranks of a machine do not divide into engines.
        RolloutEngineError: An engine did not start, or failed too often inside the block.
    """
    rollout = plan.config.rollout
    with (
        engine_kind(rollout).open(
            rollout, _served_model(plan), context, log_prefix=log_prefix
        ) as starter,
        contextlib.closing(EnginePool(starter, stream, frozen=frozen, context=context)) as engines,
    ):
        yield engines


def check_rollout_server(plan: RunPlan) -> None:
    """Checks the server that the run's rollouts come from, if it is there already.

    Raises:
        UserError: It does not respond, or cannot serve the student.
    """
    rollout = plan.config.rollout
    engine_kind(rollout).check_server(rollout, _served_model(plan))


def check_server_to_start(plan: RunPlan, node: Node) -> None:
    """Checks, on each node's first rank, the GPUs of the rollout servers that it starts, if any.

    Raises:
        UserError: A GPU is missing or in use, or servers are to run on a node that is not there.
    """
    rollout = plan.config.rollout
    engine_kind(rollout).check_host(rollout, node)


def _served_model(plan: RunPlan) -> ServedModel:
    """The student, as the rollout engine gets to know it."""
    config = plan.config
    return ServedModel(
        folder=plan.student_checkpoint.hf_folder,
        tokenizer=plan.tokenizer,
        dtype=DTYPES[config.model.params_dtype],
        max_model_len=_max_model_len(plan),
        owner=str(Path(config.output_dir).absolute()),
    )


def _max_model_len(plan: RunPlan) -> int:
    """Tokens of the longest prompt with its response, in training or evaluation."""
    rollout = plan.config.rollout
    if (given := engine_kind(rollout).max_model_len(rollout)) is not None:
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
        # A response that was stopped may end in a step that compares: it needs those of all its
        # tokens.
        logprobs=compares_logprobs(step, config)
        or (rollout.logprob_check_interval is not None and rollout.keeps_surplus),
    )


def sampling_of_check(config: RunConfig) -> SamplingParams:
    """The parameters of responses to fixed prompts, the same in every step.

    They are sampled from the whole distribution: likely tokens alone would hide a difference.
    """
    rollout = config.rollout
    return SamplingParams(
        stop_token_ids=tuple(rollout.stop_token_ids),
        max_new_tokens=min(rollout.logprob_check_tokens, rollout.max_new_tokens),
        seed=config.seed,
        logprobs=True,
    )
