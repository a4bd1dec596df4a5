"""Cost of a run from configurations alone: memory, time, and a check of host memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.distill.bridge_file import open_bridge
from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.build import DTYPES
from megatron_oprd.models.families import read_architecture
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.planning.activations import KERNELS, Kernels
from megatron_oprd.planning.communication import SentBytes, sent_bytes
from megatron_oprd.planning.engine import engine_bytes, engine_of, num_engines
from megatron_oprd.planning.flops import StageFlops, decode_flops, prefill_flops, stage_flops
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.memory import RankMemory, rank_memories, teacher_bytes
from megatron_oprd.planning.other_teachers import with_other_teachers
from megatron_oprd.planning.time import StepSeconds, step_seconds
from megatron_oprd.planning.workload import Workload, workload
from megatron_oprd.rollout.costs import EngineBytes
from megatron_oprd.training.layout import RunLayout
from megatron_oprd.training.plan import alone, place_teachers
from megatron_oprd.weights.hf_files import HFFolder
from megatron_oprd.weights.megatron_checkpoint import is_megatron


@dataclass(frozen=True, kw_only=True)
class Models:
    """Both models' architectures, and the width of the bridge's targets."""

    student: Architecture
    teacher: Architecture
    bridge_rank: int | None = None  # None: no bridge
    # Of each of ``extra_teachers`` the architecture and the bridge's rank.
    others: tuple[tuple[Architecture, int | None], ...] = ()

    def placed(self, config: RunConfig, *, num_gpus: int) -> list[RunLayout]:
        """The student with each of its teachers, placed as the run places them.

        Raises UserError if the settings do not fit the models or the number of GPUs.
        """
        teachers = [(config, self.teacher, self.bridge_rank)]
        for extra, (teacher, bridge_rank) in zip(config.extra_teachers, self.others, strict=True):
            teachers.append((alone(config, extra), teacher, bridge_rank))
        return place_teachers(self.student, teachers, world_size=num_gpus)


def read_models(config: RunConfig) -> Models:
    """Reads the models' configurations; of a Hugging Face folder only config.json.

    The bridge file is not needed if ``bridge.rank`` is given. Raises UserError if a configuration
    is missing or unsupported, or the bridge cannot be read.
    """
    bridge_rank = config.bridge.rank
    if config.bridge.path is not None and bridge_rank is None:
        bridge_rank = open_bridge(Path(config.bridge.path)).rank
    return Models(
        student=_read(config.model.student, config.model.student_hf_config),
        teacher=_read(config.model.teacher, config.model.teacher_hf_config),
        bridge_rank=bridge_rank,
        others=tuple(
            (
                _read(extra.model, extra.hf_config),
                None if extra.bridge is None else open_bridge(Path(extra.bridge)).rank,
            )
            for extra in config.extra_teachers
        ),
    )


def _read(folder: str, hf_config: str | None) -> Architecture:
    if is_megatron(Path(folder)):
        own = None if hf_config is None else Path(hf_config)
        return open_checkpoint(Path(folder), hf_config=own).architecture
    if hf_config is not None:  # a plan does not read the checkpoint
        return read_architecture(HFFolder(hf_config))
    return read_architecture(HFFolder(folder))


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Memory of a run."""

    layout: RunLayout  # placement of the student and the first teacher
    others: tuple[RunLayout, ...] = ()  # the same with each further teacher
    largest: Workload  # step with prompts and responses of maximum length
    ranks: list[RankMemory]  # one entry per distinct rank
    engine: EngineBytes | None = None  # the rollout engine on the trainer's GPUs, if it is there

    @property
    def layouts(self) -> tuple[RunLayout, ...]:
        """The layouts of all teachers, the first teacher's first."""
        return (self.layout, *self.others)

    @property
    def fullest(self) -> RankMemory:
        """The rank with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.peak_bytes)

    def fits(self, hardware: Hardware) -> bool:
        """Whether every rank has enough memory, and the engine room for the longest sequence."""
        has_room = self.engine is None or self.engine.holds_longest
        return has_room and self.fullest.peak_bytes <= hardware.memory_gb * 1e9


def estimate_memory(
    config: RunConfig, models: Models, kernels: Kernels, *, num_gpus: int, memory_gb: float
) -> MemoryEstimate:
    """Estimates the memory of a run; ``memory_gb`` is per GPU, in 10^9 bytes.

    Raises UserError if the settings do not fit the models or the number of GPUs, or the kernels a
    model.
    """
    if kernels.transformer_engine:
        _check_softcaps(config, models)
    layouts = models.placed(config, num_gpus=num_gpus)
    largest = workload(
        layouts[0],
        prompt_tokens=config.data.max_prompt_tokens,
        response_tokens=config.rollout.max_new_tokens,
        others=layouts[1:],
    )
    return memory_of(layouts, largest, kernels, memory_gb=memory_gb)


def _check_softcaps(config: RunConfig, models: Models) -> None:
    of_extra = [
        (extra.model, one)
        for extra, (one, _) in zip(config.extra_teachers, models.others, strict=True)
    ]
    for folder, model in (
        (config.model.student, models.student),
        (config.model.teacher, models.teacher),
        *of_extra,
    ):
        if model.score_softcap is not None:
            raise UserError(
                f"{folder} has attn_logit_softcapping = {model.score_softcap}, which Transformer "
                "Engine's attention does not have; give --layers local, and run it without the "
                "package transformer_engine"
            )


def memory_of(
    layouts: Sequence[RunLayout], largest: Workload, kernels: Kernels, *, memory_gb: float
) -> MemoryEstimate:
    """`estimate_memory` of models that are placed; ``largest`` is the step of maximum length."""
    layout, *others = layouts
    engine = engine_bytes(layout, largest, memory_gb=memory_gb)
    ranks = rank_memories(layout, largest, kernels, engine)
    return MemoryEstimate(
        layout=layout,
        others=tuple(others),
        largest=largest,
        ranks=[with_other_teachers(rank, others, largest, kernels) for rank in ranks],
        engine=engine,
    )


@dataclass(frozen=True, kw_only=True)
class WorkEstimate:
    """Communication, FLOPs and time of a step of typical length."""

    workload: Workload
    sent: list[SentBytes]  # by pipeline rank
    stages: list[StageFlops]  # FLOPs of each stage of a replica
    prefill: int  # FLOPs of rollout engines for a replica's share, prompts
    decode: int  # FLOPs of rollout engines for a replica's share, responses
    other_teachers: int  # FLOPs of a replica's passes of further teachers
    seconds: StepSeconds


def estimate_work(
    layouts: Sequence[RunLayout], hardware: Hardware, *, prompt_tokens: int, response_tokens: int
) -> WorkEstimate:
    """Estimates a step with prompts and responses of the given lengths, in tokens.

    ``layouts`` are those of all teachers, the first teacher's first.
    """
    layout, *others = layouts
    typical = workload(
        layout, prompt_tokens=prompt_tokens, response_tokens=response_tokens, others=others
    )
    pp_ranks = range(layout.config.parallel.pipeline_model_parallel_size)
    stages = range(len(layout.student.extent.layers_per_stage))
    return WorkEstimate(
        workload=typical,
        sent=[sent_bytes(layout, typical, pp_rank=pp_rank) for pp_rank in pp_ranks],
        stages=[stage_flops(layout, typical, stage) for stage in stages],
        prefill=prefill_flops(layout, typical),
        decode=decode_flops(layout, typical),
        other_teachers=sum(
            stage_flops(one, typical, stage).teacher for one in others for stage in stages
        ),
        seconds=step_seconds(layouts, typical, hardware),
    )


_ANY_MEMORY_GB = 80.0


def check_host_memory(
    config: RunConfig, *, num_ranks: int, ranks_on_host: int, available_bytes: int
) -> None:
    """Checks that a host's ranks have enough host memory, from configurations alone.

    ``available_bytes`` is the host's free memory. Raises UserError if it is too little.
    """
    # Those of further teachers are added below, each with its name.
    memory = _estimate(replace(config, extra_teachers=[]), num_ranks)
    fullest = max(memory.ranks, key=lambda rank: rank.host_bytes + rank.checkpoint_bytes)
    once = max(rank.written_once_bytes for rank in memory.ranks)
    needs: dict[str, int] = {}
    if fullest.host_bytes:
        needs[
            f"teacher.offload = {config.teacher.offload} and optimizer.offload_states = "
            f"{str(config.optimizer.offload_states).lower()}"
        ] = ranks_on_host * fullest.host_bytes
    for number, (extra, teacher) in enumerate(
        zip(config.extra_teachers, config.teachers[1:], strict=True)
    ):
        if teacher.offload == "cpu":
            weights = _largest_teacher(_estimate(alone(config, extra), num_ranks))
            needs[f"extra_teachers[{number}]"] = ranks_on_host * weights
    if memory.engine is not None and memory.engine.host_bytes:
        # Engines on this host, rounded up.
        engines = -(-ranks_on_host * num_engines(memory.layout) // num_ranks)
        needs[engine_of(memory.layout).host_memory_setting] = engines * memory.engine.host_bytes
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
    """Upper bound of a host's ranks that write data shared by all data-parallel replicas."""
    parallel = config.parallel
    num_stages = parallel.pipeline_model_parallel_size
    stages_on_host = -(-ranks_on_host * num_stages // num_ranks)
    of_stage = max(
        parallel.tensor_model_parallel_size,
        parallel.expert_model_parallel_size * parallel.expert_tensor_size,
    )
    return min(ranks_on_host, stages_on_host * of_stage)


def _estimate(config: RunConfig, num_ranks: int) -> MemoryEstimate:
    # Host memory does not depend on the layers' implementation or the GPU's memory: any values do.
    return estimate_memory(
        config,
        read_models(config),
        KERNELS["local"],
        num_gpus=num_ranks,
        memory_gb=_ANY_MEMORY_GB,
    )


def _largest_teacher(memory: MemoryEstimate) -> int:
    """The teacher's weights on the rank with most of them, in bytes."""
    layout = memory.layout
    itemsize = DTYPES[layout.config.model.params_dtype].itemsize
    return max(
        teacher_bytes(layout, pp_rank=rank.pp_rank, itemsize=itemsize).weights
        for rank in memory.ranks
    )
