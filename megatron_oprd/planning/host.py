"""Whether the host has the memory for what is offloaded to it."""

from megatron_oprd.config import RunConfig
from megatron_oprd.errors import UserError
from megatron_oprd.planning.activations import KERNELS
from megatron_oprd.planning.estimate import estimate_memory
from megatron_oprd.planning.models import read_models

_ANY_MEMORY_GB = 80.0


def check_host_memory(
    config: RunConfig, *, num_ranks: int, ranks_on_host: int, available_bytes: int
) -> None:
    """Refuses a run that offloads more than its hosts can take, from configurations alone.

    Args:
        config: The run.
        num_ranks: Ranks of the run.
        ranks_on_host: Those that share this host.
        available_bytes: Memory that is free on it.

    Raises:
        UserError: There is too little.
    """
    rollout = config.rollout
    keeps_weights = rollout.engine == "vllm" and rollout.vllm.sleep_level == 1
    if (
        config.teacher.offload == "none"
        and not config.optimizer.offload_states
        and not keeps_weights
    ):
        return
    models = read_models(config)
    # What is offloaded depends neither on the layers' implementation nor on the GPU's memory.
    memory = estimate_memory(
        config, models, KERNELS["local"], num_gpus=num_ranks, memory_gb=_ANY_MEMORY_GB
    )
    needed = ranks_on_host * max(rank.host_bytes for rank in memory.ranks)
    what = (
        f"teacher.offload = {config.teacher.offload} and optimizer.offload_states = "
        f"{str(config.optimizer.offload_states).lower()}"
    )
    if memory.vllm is not None and memory.vllm.host_bytes:
        engines = -(-ranks_on_host * memory.layout.data_parallel_size // num_ranks)
        needed += engines * memory.vllm.host_bytes
        what += " and rollout.vllm.sleep_level = 1"
    if needed > available_bytes:
        raise UserError(
            f"{what} need {needed / 1e9:.1f} GB of host "
            f"memory for the {ranks_on_host} ranks of this machine; {available_bytes / 1e9:.1f} GB "
            "are free. Offload less, or use teacher.precision = fp8 or more machines"
        )
