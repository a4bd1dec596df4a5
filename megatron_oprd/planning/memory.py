"""The memory of each distinct rank in each phase of a step."""

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_oprd.models.build import DTYPES
from megatron_oprd.planning.activations import Kernels
from megatron_oprd.planning.parameters import (
    count_parameters,
    gradient_bytes,
    optimizer_bytes,
)
from megatron_oprd.planning.passes import (
    kept_target_bytes,
    logprob_check_workspace,
    student_peak,
    teacher_workspace,
)
from megatron_oprd.planning.rollout import engine_bytes
from megatron_oprd.planning.teacher import teacher_bytes
from megatron_oprd.planning.workload import Workload
from megatron_oprd.training.layout import RunLayout

Phase = Literal["rollout", "teacher", "student", "optimizer"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Item = Literal[
    "student parameters",
    "gradients",
    "optimizer states",
    "teacher weights",
    "targets",
    "activations",
    "rollout engine's weights",
    "KV cache",
    "workspace",
]
ITEMS: tuple[Item, ...] = get_args(Item)


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """A rank's memory; the other ranks of its kind have the same.

    Attributes:
        pp_rank: Its place in the pipeline.
        is_leader: Whether it is its replica's first rank, which has the rollout engine.
        phases: Bytes of each item that there is in each phase, where the phase needs most.
        host_bytes: Bytes that are offloaded to the host.
    """

    pp_rank: int
    is_leader: bool
    phases: dict[Phase, dict[Item, int]]
    host_bytes: int

    @property
    def peak_phase(self) -> Phase:
        """The phase that needs most."""
        return max(PHASES, key=self.bytes_in)

    @property
    def peak_bytes(self) -> int:
        """What that phase needs."""
        return self.bytes_in(self.peak_phase)

    def bytes_in(self, phase: Phase) -> int:
        """All bytes of a phase."""
        return sum(self.phases[phase].values())


def rank_memories(layout: RunLayout, workload: Workload, kernels: Kernels) -> list[RankMemory]:
    """The memory of every distinct rank: the leader's, and those of each stage.

    Args:
        layout: The run.
        workload: The largest step.
        kernels: The layers' implementation.
    """
    parallel = layout.config.parallel
    ranks = [_rank_memory(layout, workload, kernels, 0, is_leader=True)]
    for pp_rank in range(parallel.pipeline_model_parallel_size):
        if pp_rank > 0 or parallel.tensor_model_parallel_size > 1:
            ranks.append(_rank_memory(layout, workload, kernels, pp_rank, is_leader=False))
    return ranks


def _rank_memory(
    layout: RunLayout, workload: Workload, kernels: Kernels, pp_rank: int, *, is_leader: bool
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
        # What is offloaded is there in the phase that uses it only.
        if phase == "optimizer" or not config.optimizer.offload_states:
            phases[phase]["optimizer states"] = states
        if phase == "teacher" or config.teacher.offload == "none":
            phases[phase]["teacher weights"] = teacher.weights
        elif teacher.head:
            phases[phase]["teacher weights"] = teacher.head
        # Gradient buffers are back for the second group of micro-batches.
        is_back = phase == "teacher" and workload.group_size < workload.num_micro_batches
        if phase in ("student", "optimizer") or is_back or not config.optimizer.offload_states:
            phases[phase]["gradients"] = gradients
    phases["teacher"]["targets"] = targets
    phases["teacher"]["workspace"] = teacher.decoding + teacher_workspace(layout, workload, kernels)
    phases["student"]["targets"] = peak.targets
    phases["student"]["activations"] = peak.activations
    phases["student"]["workspace"] = peak.workspace
    if is_leader:
        engine = engine_bytes(layout, workload, itemsize=itemsize)
        for phase in PHASES:
            phases[phase]["rollout engine's weights"] = engine.weights
        # Either the weights are sent, or responses are generated.
        if engine.sync_workspace > engine.kv_cache + engine.workspace:
            phases["rollout"]["workspace"] = engine.sync_workspace
        else:
            phases["rollout"]["KV cache"] = engine.kv_cache
            phases["rollout"]["workspace"] = engine.workspace
    if config.rollout.logprob_check_interval is not None:
        # Behind the rollout, when neither engine nor gradients are at work.
        check = logprob_check_workspace(layout, workload, kernels, pp_rank=pp_rank)
        rollout = phases["rollout"]
        if check > rollout.get("workspace", 0) + rollout.get("KV cache", 0):
            rollout.pop("KV cache", None)
            rollout["workspace"] = check
    host = teacher.weights - teacher.head if config.teacher.offload == "cpu" else 0
    host += states if config.optimizer.offload_states else 0
    return RankMemory(pp_rank=pp_rank, is_leader=is_leader, phases=phases, host_bytes=host)
