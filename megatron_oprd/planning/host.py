"""Whether the host has the memory for what goes to it: what is offloaded, and checkpoints."""

from megatron_oprd.config import RunConfig
from megatron_oprd.errors import UserError
from megatron_oprd.models.build import DTYPES
from megatron_oprd.planning.activations import KERNELS
from megatron_oprd.planning.estimate import MemoryEstimate, estimate_memory
from megatron_oprd.planning.models import read_models
from megatron_oprd.planning.teacher import teacher_bytes
from megatron_oprd.training.plan import alone

_ANY_MEMORY_GB = 80.0


def check_host_memory(
    config: RunConfig, *, num_ranks: int, ranks_on_host: int, available_bytes: int
) -> None:
    """Refuses a run that puts more on its hosts than they can take, from configurations alone.

    Args:
        config: The run.
        num_ranks: Ranks of the run.
        ranks_on_host: Those that share this host.
        available_bytes: Memory that is free on it.

    Raises:
        UserError: There is too little.
    """
    memory = _estimate(config, num_ranks)
    fullest = max(memory.ranks, key=lambda rank: rank.host_bytes + rank.checkpoint_bytes)
    once = max(rank.written_once_bytes for rank in memory.ranks)
    needs: dict[str, int] = {}
    if fullest.host_bytes:
        needs[
            f"teacher.offload = {config.teacher.offload} and optimizer.offload_states = "
            f"{str(config.optimizer.offload_states).lower()}"
        ] = ranks_on_host * fullest.host_bytes
    if config.teacher.offload == "cpu":
        for number, extra in enumerate(config.extra_teachers):
            weights = _largest_teacher(_estimate(alone(config, extra), num_ranks))
            needs[f"extra_teachers[{number}]"] = ranks_on_host * weights
    if memory.vllm is not None and memory.vllm.host_bytes:
        engines = -(-ranks_on_host * memory.layout.data_parallel_size // num_ranks)
        needs["rollout.vllm.sleep_level = 1"] = engines * memory.vllm.host_bytes
    if of_checkpoints := (
        ranks_on_host * fullest.checkpoint_bytes
        + _first_replica_ranks(config, num_ranks, ranks_on_host) * once
    ):
        needs["checkpoints, while one is written or read,"] = of_checkpoints
    if (needed := sum(needs.values())) > available_bytes:
        parts = " + ".join(f"{size / 1e9:.1f}" for size in needs.values())
        raise UserError(
            f"{' and '.join(needs)} need {needed / 1e9:.1f} GB of host memory"
            f"{f' ({parts})' if len(needs) > 1 else ''} for the {ranks_on_host} ranks of this "
            f"machine; {available_bytes / 1e9:.1f} GB are free. Offload less, or use "
            "teacher.precision = fp8, more machines, or no checkpoints"
        )


def _first_replica_ranks(config: RunConfig, num_ranks: int, ranks_on_host: int) -> int:
    """Most ranks of one host that write what all data-parallel replicas have."""
    parallel = config.parallel
    num_stages = parallel.pipeline_model_parallel_size
    stages_on_host = -(-ranks_on_host * num_stages // num_ranks)
    of_stage = max(
        parallel.tensor_model_parallel_size,
        parallel.expert_model_parallel_size * parallel.expert_tensor_size,
    )
    return min(ranks_on_host, stages_on_host * of_stage)


def _estimate(config: RunConfig, num_ranks: int) -> MemoryEstimate:
    # What is on the host depends neither on the layers' implementation nor on the GPU's memory.
    return estimate_memory(
        config,
        read_models(config),
        KERNELS["local"],
        num_gpus=num_ranks,
        memory_gb=_ANY_MEMORY_GB,
    )


def _largest_teacher(memory: MemoryEstimate) -> int:
    """The teacher's weights on the rank that has most of them."""
    layout = memory.layout
    itemsize = DTYPES[layout.config.model.params_dtype].itemsize
    return max(
        teacher_bytes(layout, pp_rank=rank.pp_rank, itemsize=itemsize).weights
        for rank in memory.ranks
    )
