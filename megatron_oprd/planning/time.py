"""Lower bounds of the time of a step's phases on given hardware.

The models' passes take their FLOPs at ``mfu`` of the peak on the slowest stage, plus the pipeline
bubble. Decoding reads all weights and the cache for every token and is bound by memory bandwidth;
transformers' ``generate`` is slower than this bound. An engine's GPUs share the work. A server's
time is unknown and counts as 0. Not counted: waiting for communication beyond ``mfu``,
weight sync, copies to and from the host, loading and logging.
"""

from dataclasses import dataclass

from megatron_oprd.models.build import DTYPES
from megatron_oprd.planning.engine import engine_bytes, engine_of, responses_of_engine
from megatron_oprd.planning.flops import decode_flops, prefill_flops, stage_flops
from megatron_oprd.planning.parameters import (
    count_parameters,
    gradient_bytes,
    optimizer_bytes,
    parameter_replicas,
)
from megatron_oprd.planning.workload import Workload
from megatron_oprd.training.layout import RunLayout


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU."""

    memory_gb: float  # available to the run, in 10^9 bytes
    tflops: float  # peak of bf16 matrix products, in 10^12 operations per second
    bandwidth: float  # of memory, in 10^9 bytes per second
    mfu: float  # share of the peak in the models' passes while a stage computes

    def seconds_for_flops(self, flops: float) -> float:
        """Time of one GPU for computing, in seconds."""
        return flops / (self.tflops * 1e12 * self.mfu)

    def seconds_for_bytes(self, num_bytes: float) -> float:
        """Time of one GPU for reading or writing memory, in seconds."""
        return num_bytes / (self.bandwidth * 1e9)


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds of each phase."""

    prefill: float  # the rollout engine's pass over prompts
    decode: float  # the engine's responses
    teacher: float
    student: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.prefill + self.decode + self.teacher + self.student + self.optimizer


def step_seconds(layout: RunLayout, workload: Workload, hardware: Hardware) -> StepSeconds:
    """Estimates the seconds of a step's phases."""
    itemsize = DTYPES[layout.config.model.params_dtype].itemsize
    pp_ranks = range(layout.config.parallel.pipeline_model_parallel_size)
    teacher = student = optimizer = 0.0
    for pp_rank in pp_ranks:
        stages = [stage_flops(layout, workload, s) for s in layout.stages_of_rank(pp_rank)]
        teacher = max(teacher, sum(stage.teacher for stage in stages))
        student = max(student, sum(stage.student for stage in stages))
        counts = count_parameters(layout, layout.student, pp_rank)
        states = optimizer_bytes(counts, layout, itemsize=itemsize)
        # The update reads gradients and states, and writes states and parameters.
        share = gradient_bytes(counts) / parameter_replicas(layout)
        optimizer = max(optimizer, 2 * states + 2 * share)
    prefill, decode = _rollout_seconds(layout, workload, hardware)
    return StepSeconds(
        prefill=prefill,
        decode=decode,
        teacher=hardware.seconds_for_flops(_with_bubble(layout, workload, teacher)),
        student=hardware.seconds_for_flops(_with_bubble(layout, workload, student)),
        optimizer=hardware.seconds_for_bytes(optimizer),
    )


def _with_bubble(layout: RunLayout, workload: Workload, flops: float) -> float:
    """A rank's FLOPs, plus those it could do while the pipeline fills and drains."""
    parallel = layout.config.parallel
    bubble = (parallel.pipeline_model_parallel_size - 1) / workload.group_size
    bubble /= parallel.virtual_pipeline_model_parallel_size or 1
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return flops * (1 + bubble) / ranks


def _rollout_seconds(
    layout: RunLayout, workload: Workload, hardware: Hardware
) -> tuple[float, float]:
    """Seconds of prefill and of decoding."""
    prompt, response = workload.prompt_tokens, workload.response_tokens
    engine = engine_bytes(layout, workload, memory_gb=hardware.memory_gb)
    if engine is None:
        return 0.0, 0.0
    responses = responses_of_engine(layout, workload)
    steps = -(-responses // max(engine.num_responses, 1)) * (response - 1)
    # On average the cache has the prompt and half of the response.
    cache = engine.read_cache * (prompt + response / 2) / (prompt + response)
    reading = hardware.seconds_for_bytes(steps * (engine.weights + cache))
    # Work is counted per replica.
    share = responses / workload.num_sequences / engine.num_gpus
    flops = decode_flops(layout, workload) * share
    launching = steps * engine_of(layout).seconds_of_token(layout.student.architecture.num_layers)
    # Bound by memory, by arithmetic or by launches, whichever is slowest.
    decode = max(reading, launching, hardware.seconds_for_flops(flops))
    return hardware.seconds_for_flops(prefill_flops(layout, workload) * share), decode
