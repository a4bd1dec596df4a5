"""Everything about what a run costs, and whether it fits."""

from dataclasses import dataclass

from megatron_oprd.config import RunConfig
from megatron_oprd.models.build import DTYPES
from megatron_oprd.planning.activations import Kernels
from megatron_oprd.planning.communication import SentBytes, sent_bytes
from megatron_oprd.planning.flops import StageFlops, decode_flops, prefill_flops, stage_flops
from megatron_oprd.planning.memory import RankMemory, rank_memories
from megatron_oprd.planning.models import Models
from megatron_oprd.planning.time import Hardware, StepSeconds, step_seconds
from megatron_oprd.planning.vllm import VLLMBytes, has_embedded_vllm, holds_longest, vllm_bytes
from megatron_oprd.planning.workload import Workload, workload
from megatron_oprd.training.layout import RunLayout, make_layout


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """The memory of a run.

    Attributes:
        layout: Both models, placed.
        largest: A step in which everything is as long as the settings allow.
        ranks: Every distinct rank.
        vllm: The engine beside the trainer, if it is vLLM.
    """

    layout: RunLayout
    largest: Workload
    ranks: list[RankMemory]
    vllm: VLLMBytes | None = None

    @property
    def fullest(self) -> RankMemory:
        """The rank that needs most."""
        return max(self.ranks, key=lambda rank: rank.peak_bytes)

    def fits(self, hardware: Hardware) -> bool:
        """Whether every rank has the memory it needs, and the engine room for a response."""
        has_room = self.vllm is None or holds_longest(self.vllm)
        return has_room and self.fullest.peak_bytes <= hardware.memory_gb * 1e9


def estimate_memory(
    config: RunConfig, models: Models, kernels: Kernels, *, num_gpus: int, memory_gb: float
) -> MemoryEstimate:
    """The memory of a run on ``num_gpus`` GPUs.

    Args:
        config: The run.
        models: Both models.
        kernels: The layers' implementation.
        num_gpus: GPUs of the run.
        memory_gb: Memory of each, in 10^9 bytes, of which vLLM takes a share.

    Raises:
        UserError: The settings do not fit the models or the number of GPUs.
    """
    layout = make_layout(
        config,
        student=models.student,
        teacher=models.teacher,
        world_size=num_gpus,
        bridge_rank=models.bridge_rank,
    )
    largest = workload(
        layout,
        prompt_tokens=config.data.max_prompt_tokens,
        response_tokens=config.rollout.max_new_tokens,
    )
    vllm = None
    if has_embedded_vllm(layout):
        itemsize = DTYPES[config.model.params_dtype].itemsize
        vllm = vllm_bytes(layout, largest, itemsize=itemsize, memory_gb=memory_gb)
    return MemoryEstimate(
        layout=layout,
        largest=largest,
        ranks=rank_memories(layout, largest, kernels, vllm),
        vllm=vllm,
    )


@dataclass(frozen=True, kw_only=True)
class WorkEstimate:
    """What a step of typical length sends and computes.

    Attributes:
        workload: The step.
        sent: What the ranks of each pipeline rank send.
        stages: FLOPs of each stage of a replica.
        prefill: FLOPs of a replica's rollout engine over the prompts.
        decode: FLOPs of its responses.
        seconds: How long the phases take.
    """

    workload: Workload
    sent: list[SentBytes]
    stages: list[StageFlops]
    prefill: int
    decode: int
    seconds: StepSeconds


def estimate_work(
    layout: RunLayout, hardware: Hardware, *, prompt_tokens: int, response_tokens: int
) -> WorkEstimate:
    """What a step with prompts and responses of the given lengths sends and computes."""
    typical = workload(layout, prompt_tokens=prompt_tokens, response_tokens=response_tokens)
    pp_ranks = range(layout.config.parallel.pipeline_model_parallel_size)
    stages = range(len(layout.student.extent.layers_per_stage))
    return WorkEstimate(
        workload=typical,
        sent=[sent_bytes(layout, typical, pp_rank=pp_rank) for pp_rank in pp_ranks],
        stages=[stage_flops(layout, typical, stage) for stage in stages],
        prefill=prefill_flops(layout, typical),
        decode=decode_flops(layout, typical),
        seconds=step_seconds(layout, typical, hardware),
    )
