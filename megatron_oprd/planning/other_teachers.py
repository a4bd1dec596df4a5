"""Memory of further teachers beside the first, on one rank."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_oprd.models.build import DTYPES
from megatron_oprd.planning.activations import Kernels
from megatron_oprd.planning.memory import PHASES, RankMemory, teacher_bytes
from megatron_oprd.planning.passes import kept_target_bytes, tap_bytes, teacher_workspace
from megatron_oprd.planning.workload import Workload
from megatron_oprd.training.layout import RunLayout


def with_other_teachers(
    rank: RankMemory, others: Sequence[RunLayout], workload: Workload, kernels: Kernels
) -> RankMemory:
    """A rank's memory with that of further teachers.

    All teachers' targets are kept together. Teachers run in turn: of their workspaces, and of the
    weights of those that are offloaded, the largest counts. What student layers keep for the losses
    of several teachers adds up.
    """
    phases = {phase: dict(rank.phases[phase]) for phase in PHASES}
    host = rank.host_bytes
    for layout in others:
        pp_rank = rank.pp_rank
        itemsize = DTYPES[layout.config.model.params_dtype].itemsize
        weights = teacher_bytes(layout, pp_rank=pp_rank, itemsize=itemsize)
        targets = kept_target_bytes(layout, workload, pp_rank=pp_rank)
        workspace = weights.decoding + teacher_workspace(layout, workload, kernels, pp_rank=pp_rank)
        in_teacher = phases["teacher"]
        if layout.config.teacher.offload == "none":
            for items in phases.values():
                items["teacher weights"] = items.get("teacher weights", 0) + weights.weights
        else:
            host += weights.weights
            resident = phases["student"].get("teacher weights", 0)
            alone = resident + weights.weights
            in_teacher["teacher weights"] = max(in_teacher["teacher weights"], alone)
        in_teacher["targets"] += targets
        in_teacher["workspace"] = max(in_teacher["workspace"], workspace)
        student = phases["student"]
        student["targets"] += targets
        student["activations"] += tap_bytes(layout, workload, kernels, pp_rank=pp_rank)
    return replace(rank, phases=phases, host_bytes=host)
