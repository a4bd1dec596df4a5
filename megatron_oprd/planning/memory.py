"""Memory of each distinct rank in each phase of a step."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_oprd.models.build import DTYPES
from megatron_oprd.models.teacher import layers_in_fp8, uses_engine
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.planning.activations import Kernels
from megatron_oprd.planning.engine import engine_place, sync_workspace
from megatron_oprd.planning.parameters import (
    count_parameters,
    gradient_bytes,
    has_output_loss,
    held_parameters,
    kind_of,
    layer_of,
    optimizer_bytes,
)
from megatron_oprd.planning.passes import (
    kept_target_bytes,
    logprob_check_workspace,
    student_peak,
    teacher_workspace,
)
from megatron_oprd.planning.workload import Workload
from megatron_oprd.rollout.costs import EngineBytes
from megatron_oprd.training.layout import RunLayout

_FP32 = _INT32 = 4
# Three fp32 tensors for decoding one run of a weight's rows.
_DECODING = 3 * 2**22 * _FP32


@dataclass(frozen=True, kw_only=True)
class TeacherBytes:
    """The teacher's weights on one rank, in bytes."""

    weights: int  # all, with scales
    head: int  # the part for an output-space loss, which stays on the device
    decoding: int  # workspace to decode one weight while its layer runs


def teacher_bytes(layout: RunLayout, *, pp_rank: int, itemsize: int) -> TeacherBytes:
    """The teacher's weights on a pipeline rank; ``itemsize`` is for weights that are not in FP8."""
    teacher, place = layout.config.teacher, ParallelLayout.of(layout.teacher.parallel)
    in_fp8 = layers_in_fp8(teacher, sum(layout.teacher.extent.layers_per_stage))
    weights = largest = 0
    shapes: dict[str, tuple[int, ...]] = {}  # one per kind: layers and experts are alike
    for mapping, number in held_parameters(layout, layout.teacher, pp_rank):
        kind = kind_of(mapping.megatron)
        if kind not in shapes:
            shapes[kind] = mapping.local_shape(mapping.split_at(place)[1])
        shape = shapes[kind]
        is_linear = len(shape) == 2 and not mapping.is_replicated
        if is_linear and layer_of(mapping.megatron) in in_fp8:
            weights += number * _fp8_bytes(*shape, recipe=teacher.fp8_recipe)
            largest = max(largest, math.prod(shape))
        else:
            weights += number * math.prod(shape) * itemsize
    a = layout.teacher.architecture
    head = 0
    if has_output_loss(layout, pp_rank):
        rows = layout.teacher.padded_vocab_size // place.tensor_model_parallel_size
        head = rows * a.hidden_size * itemsize
        if a.tied and pp_rank > 0:
            weights += head  # the last stage has a copy of the tied embedding
    decodes = largest and not uses_engine(teacher)
    return TeacherBytes(
        weights=weights,
        head=head,
        decoding=largest * itemsize + _DECODING if decodes else 0,
    )


def average_bytes(layout: RunLayout, *, pp_rank: int, itemsize: int) -> int:
    """The fp32 averages of a teacher that follows the student (``teacher.ema_decay``), in bytes.

    0 for fp32 weights, which are the averages themselves.
    """
    if not layout.config.teacher.ema_decay or itemsize == _FP32:
        return 0
    return teacher_bytes(layout, pp_rank=pp_rank, itemsize=itemsize).weights // itemsize * _FP32


def _fp8_bytes(rows: int, columns: int, *, recipe: str) -> int:
    """Bytes of a weight with its scales."""
    blocks = -(-rows // 128) * -(-columns // 128)
    scales = {
        "per_channel_log": rows * _FP32,
        "per_channel": rows * _FP32,
        # Also stores the block index of each row and column.
        "block_128": blocks * _FP32 + (rows + columns) * _INT32,
        "tensorwise": _FP32,
        "blockwise": blocks * _FP32,
        "mxfp8": rows * columns // 32,  # a one-byte scale per 32 elements
    }
    return rows * columns + scales[recipe]


Phase = Literal["rollout", "teacher", "student", "optimizer"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Item = Literal[
    "student parameters",
    "gradients",
    "optimizer states",
    "teacher weights",
    "teacher's averages",
    "targets",
    "activations",
    "rollout engine's weights",
    "KV cache",
    "rollout engine's workspace",
    "rollout engine's CUDA context",
    "weight sync's bucket",
    "workspace",
]
ITEMS: tuple[Item, ...] = get_args(Item)


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Memory of a rank, and of all ranks of its kind."""

    pp_rank: int  # pipeline rank
    owns_engine: bool  # sends weights to a rollout engine
    has_engine: bool  # (a part of) the rollout engine is on its device
    phases: dict[Phase, dict[Item, int]]  # bytes per item in each phase, at the phase's peak
    host_bytes: int  # offloaded teacher and optimizer
    # Host bytes of every rank while a checkpoint is written or read: its share of a distributed
    # optimizer's states.
    checkpoint_bytes: int
    # The same for ranks of one data-parallel replica only: their part of the model, and of the
    # states of an optimizer that is not distributed.
    written_once_bytes: int

    @property
    def peak_phase(self) -> Phase:
        """The phase with the highest peak."""
        return max(PHASES, key=self.bytes_in)

    @property
    def peak_bytes(self) -> int:
        """Bytes at the peak of that phase."""
        return self.bytes_in(self.peak_phase)

    def bytes_in(self, phase: Phase) -> int:
        """Bytes of all items in a phase."""
        return sum(self.phases[phase].values())


def rank_memories(
    layout: RunLayout, workload: Workload, kernels: Kernels, engine: EngineBytes | None
) -> list[RankMemory]:
    """Memory of every distinct rank: one of each kind and stage.

    ``workload`` is the largest step; ``engine`` a rollout engine on the trainer's GPUs, if any.
    """
    parallel = layout.config.parallel
    stages = range(parallel.pipeline_model_parallel_size)
    # (stage, owns an engine, has a part of one)
    if engine is not None and engine_place(layout) == "device":
        # Engines are over all GPUs. Which ranks own one has nothing to do with stages.
        owns = (True, False) if engine.num_gpus > 1 else (True,)
        kinds = [(stage, own, True) for stage in stages for own in owns]
    else:
        has_engine = engine is not None
        kinds = [(0, True, has_engine)]
        if parallel.tensor_model_parallel_size * parallel.context_parallel_size > 1:
            kinds.append((0, False, False))
        kinds += [(stage, False, False) for stage in stages if stage > 0]
    return [_rank_memory(layout, workload, kernels, engine, *kind) for kind in kinds]


def _rank_memory(
    layout: RunLayout,
    workload: Workload,
    kernels: Kernels,
    engine: EngineBytes | None,
    pp_rank: int,
    owns_engine: bool,
    has_engine: bool,
) -> RankMemory:
    config = layout.config
    itemsize = DTYPES[config.model.params_dtype].itemsize
    student = count_parameters(layout, layout.student, pp_rank)
    gradients = gradient_bytes(student)
    states = optimizer_bytes(student, layout, itemsize=itemsize)
    teacher = teacher_bytes(layout, pp_rank=pp_rank, itemsize=itemsize)
    targets = kept_target_bytes(layout, workload, pp_rank=pp_rank)
    peak = student_peak(layout, workload, kernels, pp_rank=pp_rank)
    phases: dict[Phase, dict[Item, int]] = {
        phase: {"student parameters": student.total * itemsize} for phase in PHASES
    }
    for phase in PHASES:
        # Offloaded items are on the device only in the phase that uses them.
        if phase == "optimizer" or not config.optimizer.offload_states:
            phases[phase]["optimizer states"] = states
        if phase == "teacher" or config.teacher.offload == "none":
            phases[phase]["teacher weights"] = teacher.weights
        elif teacher.head:
            phases[phase]["teacher weights"] = teacher.head
        # With several groups, the teacher's later turns run after the student's first, which
        # allocated the gradient buffers.
        is_back = phase == "teacher" and workload.group_size < workload.num_micro_batches
        if phase in ("student", "optimizer") or is_back or not config.optimizer.offload_states:
            phases[phase]["gradients"] = gradients
    phases["teacher"]["targets"] = targets
    workspace = teacher_workspace(layout, workload, kernels, pp_rank=pp_rank)
    phases["teacher"]["workspace"] = teacher.decoding + workspace
    phases["student"]["targets"] = peak.targets
    phases["student"]["activations"] = peak.activations
    phases["student"]["workspace"] = peak.workspace
    check = 0
    if config.rollout.logprob_check_interval is not None:
        check = logprob_check_workspace(layout, workload, kernels, pp_rank=pp_rank)
    add = _add_inside if engine_place(layout) == "trainer" else _add_beside
    gathered = sync_workspace(layout, owns_engine=owns_engine)
    add(phases, engine if has_engine else None, gathered, check, owns_engine=owns_engine)
    if averages := average_bytes(layout, pp_rank=pp_rank, itemsize=itemsize):
        for items in phases.values():
            items["teacher's averages"] = averages
    writes, divides = config.checkpoint.is_on, config.optimizer.use_distributed_optimizer
    host = teacher.weights - teacher.head if config.teacher.offload == "cpu" else 0
    host += states if config.optimizer.offload_states else 0
    return RankMemory(
        pp_rank=pp_rank,
        owns_engine=owns_engine,
        has_engine=has_engine,
        phases=phases,
        host_bytes=host,
        checkpoint_bytes=states if divides and writes else 0,
        written_once_bytes=(student.total * itemsize + (0 if divides else states)) * writes,
    )


def _add_inside(
    phases: dict[Phase, dict[Item, int]],
    engine: EngineBytes | None,
    gathered: int,
    check: int,
    *,
    owns_engine: bool,
) -> None:
    """Adds an engine in this rank's process, if any, or the log-probability check if larger.

    ``gathered`` are the bytes of the weight sync, ``check`` those of the check.
    """
    rollout = phases["rollout"]
    if engine is not None:
        for items in phases.values():
            items["rollout engine's weights"] = engine.weights
        # The sync and the generation do not overlap: the larger counts.
        if gathered > engine.kv_cache + engine.workspace:
            rollout["workspace"] = gathered
        else:
            rollout["KV cache"] = engine.kv_cache
            rollout["workspace"] = engine.workspace
    # The check runs after the rollout, without engine workspace or gradients.
    if check > rollout.get("workspace", 0) + rollout.get("KV cache", 0):
        rollout.pop("KV cache", None)
        rollout["workspace"] = check


def _add_beside(
    phases: dict[Phase, dict[Item, int]],
    engine: EngineBytes | None,
    gathered: int,
    check: int,
    *,
    owns_engine: bool,
) -> None:
    """Adds an engine in another process on this device, if any; bytes as in `_add_inside`."""
    rollout = phases["rollout"]
    if engine is None:
        if workspace := max(gathered, check):
            rollout["workspace"] = workspace
        return
    awake: dict[Item, int] = {
        "rollout engine's weights": engine.weights,
        "KV cache": engine.kv_cache,
        "rollout engine's workspace": engine.workspace,
    }
    for phase, items in phases.items():
        items["rollout engine's CUDA context"] = engine.context
        if phase == "rollout" or not engine.sleeps:
            items |= awake
    if owns_engine:
        rollout["weight sync's bucket"] = engine.bucket
    if not engine.sleeps:
        gathered = max(gathered, check)
    if gathered:
        rollout["workspace"] = gathered
    # The check runs while the engine sleeps: it counts if it exceeds the awake engine.
    if check > gathered + sum(awake.values()):
        for item in awake:
            rollout.pop(item)
        rollout["workspace"] = check
