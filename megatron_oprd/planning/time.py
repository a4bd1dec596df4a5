"""How long a step's phases take on given hardware, at least.

The models' passes take as long as their FLOPs at the share of the peak that ``mfu`` says, on the
slowest stage, and the pipeline's bubble. Decoding reads all weights and the cache for every token,
and so is bound by the memory's bandwidth; transformers' ``generate`` is slower than that bound. A
vLLM engine's GPUs share that work. A server's takes no time here, since nothing is known of it.
Not counted: waiting for messages that ``mfu`` does not cover, weight sync, copies from and to the
host, loading and logging.
"""

from dataclasses import dataclass

from megatron_oprd.models.build import DTYPES
from megatron_oprd.planning.flops import decode_flops, prefill_flops, stage_flops
from megatron_oprd.planning.parameters import (
    count_parameters,
    gradient_bytes,
    optimizer_bytes,
    parameter_replicas,
    stages_of_rank,
)
from megatron_oprd.planning.vllm import (
    engine_bytes,
    generation_batch,
    has_embedded_vllm,
    kv_bytes_per_token,
    vllm_bytes,
)
from megatron_oprd.planning.workload import Workload
from megatron_oprd.training.layout import RunLayout


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU.

    Attributes:
        memory_gb: Memory that a run may take, in 10^9 bytes.
        tflops: Peak of bf16 matrix products, in 10^12 operations a second.
        bandwidth: Memory bandwidth, in 10^9 bytes a second.
        mfu: Share of the peak that the models' passes reach while a stage computes.
    """

    memory_gb: float
    tflops: float
    bandwidth: float
    mfu: float

    def seconds_for_flops(self, flops: float) -> float:
        """Seconds that one GPU computes."""
        return flops / (self.tflops * 1e12 * self.mfu)

    def seconds_for_bytes(self, num_bytes: float) -> float:
        """Seconds that one GPU reads or writes its memory."""
        return num_bytes / (self.bandwidth * 1e9)


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds of each phase.

    Attributes:
        prefill: The rollout engine's pass over the prompts.
        decode: Its responses.
        teacher: The teacher's pass.
        student: The student's passes.
        optimizer: The update.
    """

    prefill: float
    decode: float
    teacher: float
    student: float
    optimizer: float

    @property
    def total(self) -> float:
        """The whole step."""
        return self.prefill + self.decode + self.teacher + self.student + self.optimizer


def step_seconds(layout: RunLayout, workload: Workload, hardware: Hardware) -> StepSeconds:
    """The seconds of a step's phases.

    Args:
        layout: The run.
        workload: The step.
        hardware: The GPUs.
    """
    itemsize = DTYPES[layout.config.model.params_dtype].itemsize
    pp_ranks = range(layout.config.parallel.pipeline_model_parallel_size)
    teacher = student = optimizer = 0.0
    for pp_rank in pp_ranks:
        stages = [stage_flops(layout, workload, s) for s in stages_of_rank(layout, pp_rank)]
        teacher = max(teacher, sum(stage.teacher for stage in stages))
        student = max(student, sum(stage.student for stage in stages))
        counts = count_parameters(layout, layout.student, pp_rank)
        states = optimizer_bytes(counts, layout, itemsize=itemsize)
        # Reads gradients and states, writes states and parameters.
        share = gradient_bytes(counts) / parameter_replicas(layout)
        optimizer = max(optimizer, 2 * states + 2 * share)
    prefill, decode = _rollout_seconds(layout, workload, hardware, itemsize)
    return StepSeconds(
        prefill=prefill,
        decode=decode,
        teacher=hardware.seconds_for_flops(_with_bubble(layout, workload, teacher)),
        student=hardware.seconds_for_flops(_with_bubble(layout, workload, student)),
        optimizer=hardware.seconds_for_bytes(optimizer),
    )


def _with_bubble(layout: RunLayout, workload: Workload, flops: float) -> float:
    """FLOPs of a rank, with those that it could do while the pipeline fills and empties."""
    parallel = layout.config.parallel
    bubble = (parallel.pipeline_model_parallel_size - 1) / workload.group_size
    bubble /= parallel.virtual_pipeline_model_parallel_size or 1
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return flops * (1 + bubble) / ranks


def _rollout_seconds(
    layout: RunLayout, workload: Workload, hardware: Hardware, itemsize: int
) -> tuple[float, float]:
    """Of the prompts' pass, and of decoding."""
    prompt, response = workload.prompt_tokens, workload.response_tokens
    if has_embedded_vllm(layout):
        vllm = vllm_bytes(layout, workload, itemsize=itemsize, memory_gb=hardware.memory_gb)
        num_gpus, weights, batch = vllm.num_gpus, vllm.weights, max(vllm.num_responses, 1)
        a = layout.student.architecture
        of_token = kv_bytes_per_token(a, size=num_gpus, itemsize=itemsize)
        whole_cache = batch * (prompt + response) * of_token
    elif layout.config.rollout.engine == "vllm":
        return 0.0, 0.0
    else:
        engine = engine_bytes(layout, workload, itemsize=itemsize)
        num_gpus, weights, whole_cache = 1, engine.weights, engine.kv_cache
        batch = generation_batch(layout, workload)
    steps = -(-workload.num_sequences // batch) * (response - 1)
    # The cache is, on average, as long as the prompt and half of the response.
    cache = whole_cache * (prompt + response / 2) / (prompt + response)
    reading = hardware.seconds_for_bytes(steps * (weights + cache))
    flops = decode_flops(layout, workload) / num_gpus
    decode = max(reading, hardware.seconds_for_flops(flops))
    return hardware.seconds_for_flops(prefill_flops(layout, workload) / num_gpus), decode
