"""Lower bounds of the time of a step's phases on given hardware.

A pass of a model takes, on its slowest pipeline rank, its FLOPs at ``mfu`` of the peak and the time
of its messages (`PassSeconds`), and on top of both the pipeline's bubble (arXiv:2104.04473, section
2.2). Messages are not hidden behind computation, except the reduction of gradients where
``optimizer.overlap_grad_reduce`` asks for it; context-parallel exchanges, which Transformer Engine
hides in part, count in full. `Hardware` has what a collective takes, `communication` how many bytes
a rank sends in it.

Decoding is as fast as the engine's kind says (`EngineKind.seconds_of_token`). With an engine that
overlaps (``rollout.max_staleness``) the longer of rollouts and training counts, as if neither
slowed the other. A server's time is unknown and counts as 0. Not counted: latencies of the
trainer's collectives, loading and logging.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from megatron_oprd.models.build import DTYPES
from megatron_oprd.planning.communication import SentBytes, sent_bytes
from megatron_oprd.planning.engine import (
    engine_bytes,
    engine_of,
    engine_place,
    responses_of_engine,
)
from megatron_oprd.planning.flops import decode_flops, prefill_flops, stage_flops
from megatron_oprd.planning.hardware import Group, Hardware
from megatron_oprd.planning.memory import teacher_bytes
from megatron_oprd.planning.parameters import (
    count_parameters,
    expert_replicas,
    gradient_bytes,
    optimizer_bytes,
    parameter_replicas,
)
from megatron_oprd.planning.workload import Workload
from megatron_oprd.training.layout import ModelLayout, RunLayout


@dataclass(frozen=True, kw_only=True)
class PassSeconds:
    """Seconds of a model's pass on its slowest pipeline rank."""

    compute: float = 0.0
    tensor: float = 0.0  # gathers and scatters, or all-reduces, on the tensor-parallel group
    context: float = 0.0  # keys and values on the context-parallel group
    experts: float = 0.0  # tokens to experts and back
    pipeline: float = 0.0  # hidden states to other stages
    bubble: float = 0.0  # while the pipeline fills and drains

    def __add__(self, other: "PassSeconds") -> "PassSeconds":
        """Both passes, one after the other."""
        names = [part.name for part in fields(self)]
        return PassSeconds(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def messages(self) -> float:
        """Seconds of all messages."""
        return self.tensor + self.context + self.experts + self.pipeline

    @property
    def total(self) -> float:
        """Seconds of the whole pass."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds of each phase."""

    prefill: float  # the rollout engine's pass over prompts
    decode: float  # the engine's responses
    teacher: PassSeconds
    student: PassSeconds
    gradients: float  # their reduction over the replicas, as far as it is not hidden
    optimizer: float
    parameters: float  # gather of updated parameters over the replicas
    copies: float  # to and from the host's memory (offload), as far as they are not hidden
    sync: float  # new weights to the rollout engines
    overlaps: bool = False  # the rollouts are the next step's, made while this one trains

    @property
    def rollout(self) -> float:
        """Seconds of the rollout phase, without the weight sync."""
        return self.prefill + self.decode

    @property
    def update(self) -> float:
        """Seconds from the last gradient to the updated parameters."""
        return self.gradients + self.optimizer + self.parameters

    @property
    def training(self) -> float:
        """Seconds of all phases but the rollout and the weight sync."""
        return self.teacher.total + self.student.total + self.update + self.copies

    @property
    def hidden(self) -> float:
        """Seconds of the shorter of rollouts and training, if they go on beside each other."""
        return min(self.rollout, self.training) if self.overlaps else 0.0

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.rollout + self.training + self.sync - self.hidden


def step_seconds(
    layouts: Sequence[RunLayout], workload: Workload, hardware: Hardware
) -> StepSeconds:
    """Estimates the seconds of a step's phases.

    ``layouts`` are those of all teachers, the first teacher's first. Every teacher reads all
    sequences, also those that another teaches.
    """
    layout, *others = layouts
    pp_ranks = range(layout.config.parallel.pipeline_model_parallel_size)
    sent = [sent_bytes(layout, workload, pp_rank=pp_rank) for pp_rank in pp_ranks]
    teacher = _slowest(
        _teacher_pass(layout, workload, hardware, pp_rank, sent[pp_rank]) for pp_rank in pp_ranks
    )
    for other in others:
        teacher += _slowest(
            _teacher_pass(
                other, workload, hardware, pp_rank, sent_bytes(other, workload, pp_rank=pp_rank)
            )
            for pp_rank in pp_ranks
        )
    student = _slowest(
        _student_pass(layout, workload, hardware, pp_rank, sent[pp_rank]) for pp_rank in pp_ranks
    )
    prefill, decode = rollout_seconds(layout, workload, hardware)
    return StepSeconds(
        prefill=prefill,
        decode=decode,
        teacher=teacher,
        student=student,
        gradients=max(_gradients(layout, workload, hardware, one, student) for one in sent),
        optimizer=max(_optimizer(layout, hardware, pp_rank) for pp_rank in pp_ranks),
        parameters=max(
            _over_replicas(layout, hardware, one.parameters, one.expert_parameters) for one in sent
        ),
        copies=_copies(layouts, workload, hardware, teacher),
        sync=max(_weight_sync(layout, hardware, one) for one in sent),
        overlaps=overlaps_training(layout),
    )


def overlaps_training(layout: RunLayout) -> bool:
    """Whether the engine generates a later step's rollouts while a step trains."""
    return engine_of(layout).overlaps and layout.config.rollout.steps_ahead > 0


def _slowest(passes: Iterable[PassSeconds]) -> PassSeconds:
    return max(passes, key=lambda one: one.total)


def _teacher_pass(
    layout: RunLayout, workload: Workload, hardware: Hardware, pp_rank: int, sent: SentBytes
) -> PassSeconds:
    flops = sum(
        stage_flops(layout, workload, stage).teacher for stage in layout.stages_of_rank(pp_rank)
    )
    return _pass(
        layout, workload.of_teacher, hardware, layout.teacher, flops=flops, tensor=sent.teacher_tp,
        context=sent.teacher_cp, experts=sent.teacher_experts, pipeline=sent.teacher_pp,
    )  # fmt: skip


def _student_pass(
    layout: RunLayout, workload: Workload, hardware: Hardware, pp_rank: int, sent: SentBytes
) -> PassSeconds:
    flops = sum(
        stage_flops(layout, workload, stage).student for stage in layout.stages_of_rank(pp_rank)
    )
    return _pass(
        layout, workload, hardware, layout.student, flops=flops, tensor=sent.student_tp,
        context=sent.student_cp, experts=sent.student_experts, pipeline=sent.student_pp,
    )  # fmt: skip


def _pass(
    layout: RunLayout,
    workload: Workload,
    hardware: Hardware,
    model: ModelLayout,
    *,
    flops: int,  # of a pipeline rank, over its tensor- and context-parallel ranks
    tensor: int,  # bytes that a rank sends, as the next ones
    context: int,
    experts: int,
    pipeline: int,
) -> PassSeconds:
    """Seconds of a pass on a pipeline rank.

    The bubble is the share (p - 1) / (m v) of the rest, with p pipeline ranks, m micro-batches
    between two turns of teacher and student, and v chunks a rank.
    """
    parallel = layout.config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pp = parallel.pipeline_model_parallel_size
    # Expert-parallel and expert-tensor-parallel ranks together are consecutive.
    of_experts = Group(
        size=model.parallel.expert_model_parallel_size * model.parallel.expert_tensor_size, stride=1
    )
    parts = {
        "compute": hardware.seconds_for_flops(flops / (tp * cp)),
        "tensor": hardware.seconds_of_ring(tensor, Group(size=tp, stride=1)),
        "context": hardware.seconds_of_ring(context, Group(size=cp, stride=tp)),
        "experts": hardware.seconds_of_all_to_all(experts, of_experts),
        "pipeline": hardware.seconds_of_send(
            pipeline, between_nodes=layout.world_size > hardware.gpus_per_node
        ),
    }
    bubble = (pp - 1) / workload.group_size / (parallel.virtual_pipeline_model_parallel_size or 1)
    return PassSeconds(**parts, bubble=bubble * sum(parts.values()))


def _over_replicas(layout: RunLayout, hardware: Hardware, plain: int, experts: int) -> float:
    """Seconds of a reduction or gather over the copies of parameters, and over those of experts."""
    parallel = layout.student.parallel
    replicas = Group(size=parameter_replicas(layout), stride=parallel.tensor_model_parallel_size)
    of_experts = Group(
        size=expert_replicas(layout),
        stride=parallel.expert_tensor_size * parallel.expert_model_parallel_size,
    )
    return hardware.seconds_of_ring(plain, replicas) + hardware.seconds_of_ring(experts, of_experts)


def _gradients(
    layout: RunLayout, workload: Workload, hardware: Hardware, sent: SentBytes, student: PassSeconds
) -> float:
    """Seconds of the reduction that the student's pass does not hide.

    With ``overlap_grad_reduce`` the last micro-batch's backward pass hides it, which is at least
    half of that micro-batch's time.
    """
    needed = _over_replicas(layout, hardware, sent.gradients, sent.expert_gradients)
    if not layout.config.optimizer.overlap_grad_reduce:
        return needed
    return max(needed - student.compute / workload.num_micro_batches / 2, 0.0)


def _optimizer(layout: RunLayout, hardware: Hardware, pp_rank: int) -> float:
    """The update reads gradients and states, and writes states and parameters."""
    itemsize = DTYPES[layout.config.model.params_dtype].itemsize
    counts = count_parameters(layout, layout.student, pp_rank)
    states = optimizer_bytes(counts, layout, itemsize=itemsize)
    share = gradient_bytes(counts) / parameter_replicas(layout)
    return hardware.seconds_for_bytes(2 * states + 2 * share)


def _copies(
    layouts: Sequence[RunLayout], workload: Workload, hardware: Hardware, teacher: PassSeconds
) -> float:
    """Seconds of copies between GPU and host.

    An offloaded teacher comes once for each group of micro-batches, while its first layers already
    compute; it does not go back, since it does not change. Optimizer states come and go once, as
    the weights of an engine that sleeps in the host's memory.
    """
    layout = layouts[0]
    config = layout.config
    itemsize = DTYPES[config.model.params_dtype].itemsize
    seconds = 0.0
    for pp_rank in range(config.parallel.pipeline_model_parallel_size):
        weights = states = 0
        for one in layouts:
            if one.config.teacher.offload == "cpu":
                of_teacher = teacher_bytes(one, pp_rank=pp_rank, itemsize=itemsize)
                weights += of_teacher.weights - of_teacher.head
        if config.optimizer.offload_states:
            counts = count_parameters(layout, layout.student, pp_rank)
            states = optimizer_bytes(counts, layout, itemsize=itemsize)
        brought = hardware.seconds_of_copy(workload.num_groups * weights)
        shown = max(brought - teacher.compute, 0.0)
        seconds = max(seconds, shown + hardware.seconds_of_copy(2 * states))
    engine = engine_bytes(layout, workload, memory_gb=hardware.memory_gb)
    # One that generates ahead sleeps before a checkpoint only.
    if engine is not None and engine.sleeps:
        seconds += hardware.seconds_of_copy(2 * engine.host_bytes / engine.num_gpus)
    return seconds


def _weight_sync(layout: RunLayout, hardware: Hardware, sent: SentBytes) -> float:
    """Seconds in which new weights reach the engines; what these do to load them is not counted.

    The ranks of a stage send in equal shares: between nodes if stages are on several, otherwise as
    the ranks that share the weights are. Then each engine copies all weights once: on its GPU
    (read and written there), to its other GPUs, or over the network to a server.
    """
    parallel = layout.student.parallel
    shares = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    of_experts = parallel.expert_tensor_size * parallel.expert_model_parallel_size
    ranks = max(shares, of_experts)
    stages = parallel.pipeline_model_parallel_size
    if stages > 1:
        between = layout.world_size > hardware.gpus_per_node
        seconds = hardware.seconds_of_send(sent.weight_sync / ranks, between_nodes=between)
    else:
        group = Group(size=ranks, stride=1)
        seconds = hardware.seconds_of_ring(sent.weight_sync / ranks, group)
    if engine_place(layout) == "server":
        return seconds + hardware.seconds_of_send(sent.into_engine, between_nodes=True)
    if engine_of(layout).num_gpus(layout.config.rollout) > 1:
        return seconds + hardware.seconds_of_send(sent.into_engine, between_nodes=False)
    return seconds + hardware.seconds_for_bytes(2 * sent.into_engine)


def rollout_seconds(
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
    # Work is counted per replica.
    share = responses / workload.num_sequences / engine.num_gpus
    computing = hardware.seconds_for_flops(decode_flops(layout, workload) * share)
    # Bound by memory or by arithmetic, whichever is slower; then by what the engine adds.
    working = max(hardware.seconds_for_bytes(engine.weights + cache), computing / max(steps, 1))
    student = layout.student.architecture
    at_once = min(responses, max(engine.num_responses, 1))
    itemsize = DTYPES[layout.config.model.params_dtype].itemsize
    of_token = engine_of(layout).seconds_of_token(
        layout.config.rollout,
        num_layers=student.num_layers,
        working=working,
        message_bytes=at_once * student.hidden_size * itemsize,
    )
    return hardware.seconds_for_flops(prefill_flops(layout, workload) * share), steps * of_token
