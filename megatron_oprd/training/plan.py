"""What a run will do, worked out and checked from configurations alone: no weight is read."""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd.config.load import dump_config
from megatron_oprd.config.schema import (
    BridgeConfig,
    EvaluationConfig,
    ExtraTeacherConfig,
    OutputLossConfig,
    RunConfig,
)
from megatron_oprd.data.benchmarks import Benchmark, check_length, load_benchmarks, tokenized
from megatron_oprd.data.teacher_sequences import TeacherReader
from megatron_oprd.distill.bridge_file import BridgeSource, open_bridge
from megatron_oprd.distill.projectors import Projectors
from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.open_checkpoint import OpenedCheckpoint, open_checkpoint
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.vllm.engine import check_vllm_is_there
from megatron_oprd.training.layout import ModelLayout, RunLayout, make_layout
from megatron_oprd.training.reading import chat_format_of_benchmarks, plan_reading
from megatron_oprd.weights.output_folder import check_output_folder
from megatron_oprd.weights.source import WeightSource


@dataclass(frozen=True, kw_only=True)
class ModelPlan(ModelLayout):
    """One model of the run.

    Attributes:
        checkpoint: The Hugging Face folder or Megatron checkpoint.
    """

    checkpoint: WeightSource


@dataclass(frozen=True, kw_only=True)
class RunPlan(RunLayout):
    """A whole run.

    Attributes:
        student: The student.
        teacher: The teacher, cut at its deepest mapped layer.
        tokenizer: The student's.
        benchmarks: What the student is evaluated on during the run.
        bridge: What the states go through before they are compared; None compares them directly.
        teacher_reader: How the teacher reads rollouts; None: the student's sequences.
        others: The run as it concerns each of the extra teachers.
    """

    student: ModelPlan
    teacher: ModelPlan
    tokenizer: PreTrainedTokenizerBase
    benchmarks: list[Benchmark]
    bridge: BridgeSource | None = None
    teacher_reader: TeacherReader | None = None
    others: "tuple[RunPlan, ...]" = ()

    def projectors(self, context: ParallelContext) -> Projectors | None:
        """Reads the projectors of this rank's layers; None without a bridge."""
        if self.bridge is None:
            return None
        assert self.bridge_rank is not None
        pairs = self.pairs_of_rank(context.pp_rank)
        return self.bridge.read(pairs, rank=self.bridge_rank, device=context.device)


def export_folder(config: RunConfig) -> Path:
    """Where the distilled student is written at the end."""
    return Path(config.output_dir) / "student"


def make_plan(config: RunConfig, *, world_size: int) -> RunPlan:
    """Works out a run for ``world_size`` processes, reading configurations and file headers only.

    Raises:
        UserError: A model, a tokenizer, the bridge or the prompts cannot be used, or the settings
            do not fit the models or the number of processes.
    """
    _check_output_dir(config)
    if not config.extra_teachers:
        return plan_models(config, world_size=world_size)
    return _plan_teachers(config, world_size)


def _plan_teachers(config: RunConfig, world_size: int) -> RunPlan:
    """Plans a run for each of its teachers alone, and puts the plans together."""

    def plan(number: int, one: RunConfig, min_running_layers: int) -> RunPlan:
        try:
            return plan_models(one, world_size=world_size, min_running_layers=min_running_layers)
        except UserError as error:
            if number == 0:
                raise
            raise UserError(f"extra_teachers[{number - 1}], as a teacher alone: {error}") from error

    runs = [config, *(alone(config, extra) for extra in config.extra_teachers)]
    # All layers run in these, so that what is worked out does not depend on the other teachers.
    first = [plan(number, one, sys.maxsize) for number, one in enumerate(runs)]
    running = max((pair.student + 1 for one in first for pair in one.pairs), default=0)
    if config.compares_outputs:
        running = first[0].student.architecture.num_layers
    main = plan(0, config, running)
    stages = list(main.student.extent.layers_per_stage)
    others = [
        plan(
            number,
            replace(one, parallel=replace(one.parallel, num_layers_per_stage=stages)),
            running,
        )
        for number, one in enumerate(runs[1:], start=1)
    ]
    return replace(main, others=tuple(others))


def alone(config: RunConfig, extra: ExtraTeacherConfig) -> RunConfig:
    """The run that has an extra teacher as its only one."""
    return replace(
        config,
        model=replace(config.model, teacher=extra.model, teacher_hf_config=extra.hf_config),
        teacher=replace(config.teacher, prompt_share=extra.prompt_share, refresh_interval=None),
        taps=replace(config.taps, layers=extra.layers, layer_map=extra.layer_map),
        loss=replace(config.loss, coefficient=extra.coefficient, layer_weights=None),
        output_loss=OutputLossConfig(),
        bridge=BridgeConfig(path=extra.bridge),
        evaluation=EvaluationConfig(),
        extra_teachers=[],
    )


def plan_models(
    config: RunConfig, *, world_size: int, min_running_layers: int = 0, builds_bridge: bool = False
) -> RunPlan:
    """Opens and places the student and the first teacher of a run.

    Args:
        config: The run's configuration.
        world_size: Processes.
        min_running_layers: Student layers that run in any case, for another teacher.
        builds_bridge: Whether this is for building a bridge, so that hidden states need not be
            comparable.

    Raises:
        UserError: See `make_plan`.
    """
    if config.rollout.engine == "vllm" and config.rollout.vllm.server_url is None:
        check_vllm_is_there()
    student = _open(config.model.student, config.model.student_hf_config, "student")
    teacher = _open(config.model.teacher, config.model.teacher_hf_config, "teacher")
    student_arch, teacher_arch = student.architecture, teacher.architecture
    bridge = None if config.bridge.path is None else open_bridge(Path(config.bridge.path))
    layout = make_layout(
        config,
        student=student_arch,
        teacher=teacher_arch,
        world_size=world_size,
        min_running_layers=min_running_layers,
        bridge_rank=None if bridge is None else _bridge_rank(config.bridge, bridge),
    )
    _check_max_model_len(config, student_arch)
    if bridge is not None:
        bridge.check(
            student=student_arch, teacher=teacher_arch, pairs=layout.pairs, taps=config.taps
        )
    elif layout.pairs and not builds_bridge:
        _check_widths(student_arch, teacher_arch)
    tokenizer, teacher_reader = plan_reading(
        layout, student_folder=student.source.hf_folder, teacher_folder=teacher.source.hf_folder
    )
    student.check_tensors()
    teacher.check_tensors()
    return RunPlan(
        config=config,
        student=ModelPlan(checkpoint=student.source, **vars(layout.student)),
        teacher=ModelPlan(checkpoint=teacher.source, **vars(layout.teacher)),
        tokenizer=tokenizer,
        benchmarks=_benchmarks(config, tokenizer, student_arch),
        pairs=layout.pairs,
        data_parallel_size=layout.data_parallel_size,
        min_running_layers=min_running_layers,
        bridge_rank=layout.bridge_rank,
        bridge=bridge,
        teacher_reader=teacher_reader,
    )


def _check_max_model_len(config: RunConfig, student: Architecture) -> None:
    found, limit = config.rollout.vllm.max_model_len, student.max_position_embeddings
    if found is not None and limit is not None and found > limit:
        raise UserError(
            f"rollout.vllm.max_model_len = {found}: model.student has max_position_embeddings = "
            f"{limit}; give at most that"
        )


def _check_widths(student: Architecture, teacher: Architecture) -> None:
    if student.hidden_size != teacher.hidden_size:
        raise UserError(
            f"model.student is {student.hidden_size} wide, model.teacher {teacher.hidden_size}: "
            "hidden states can only be compared directly at equal width. Models of other widths "
            "are matched through a bridge (OPRD-Bridge, frozen projectors): build one with "
            "torchrun ... -m megatron_oprd.build_bridge --config bridge.yaml, and give its folder "
            "as bridge.path"
        )


def _bridge_rank(settings: BridgeConfig, bridge: BridgeSource) -> int:
    rank = bridge.rank if settings.rank is None else settings.rank
    if not 2 <= rank <= bridge.rank:
        raise UserError(
            f"bridge.rank = {settings.rank}: bridge.path = {settings.path} has {bridge.rank} "
            f"directions, of which 2 to {bridge.rank} can be used; one alone is, as a unit vector, "
            "only a sign"
        )
    return rank


def _open(folder: str, hf_config: str | None, model: str) -> OpenedCheckpoint:
    return open_checkpoint(
        Path(folder),
        hf_config=None if hf_config is None else Path(hf_config),
        hf_setting=f"model.{model}_hf_config",
    )


def describe(plan: RunPlan) -> str:
    """The plan for a reader: configuration, layer map, and which layers sit on which stage."""
    config = plan.config
    pp = config.parallel.pipeline_model_parallel_size
    lines = [
        "# configuration",
        dump_config(config).rstrip(),
        "",
        f"# layer map, 0-based: student layer -> teacher layer ({len(plan.pairs)} of "
        f"{plan.student.architecture.num_layers} student layers)",
        ", ".join(f"{pair.student} -> {pair.teacher}" for pair in plan.pairs),
        "",
        f"# pipeline stages ({plan.data_parallel_size} data-parallel replicas)",
    ]
    student_end = teacher_end = 0
    counts = zip(
        plan.student.extent.layers_per_stage, plan.teacher.extent.layers_per_stage, strict=True
    )
    for stage, (of_student, of_teacher) in enumerate(counts):
        name = f"rank {stage % pp}"
        if config.parallel.virtual_pipeline_model_parallel_size is not None:
            name += f", chunk {stage // pp}"
        lines.append(
            f"{name}: student {_layers(student_end, of_student)}; "
            f"teacher {_layers(teacher_end, of_teacher)}"
        )
        student_end += of_student
        teacher_end += of_teacher
    not_run = plan.student.architecture.num_layers - plan.num_running_layers
    not_built = plan.teacher.architecture.num_layers - teacher_end
    if plan.compares_outputs:
        lines.append(
            "both models run to their LM heads, which the last stage compares: "
            f"output_loss.kind = {config.output_loss.kind}"
        )
    else:
        lines.append(
            f"student: {not_run} layers past the deepest tap and the LM head are frozen and not "
            f"run; teacher: {not_built} layers and the LM head are not built"
        )
    if config.rollout.one_step_off_policy:
        lines.append(
            "rollouts are drawn while the step before is computed, with weights one update behind"
        )
    if config.rollout.logprob_check_interval is not None:
        lines.append(
            f"every {config.rollout.logprob_check_interval} steps the whole student, LM head "
            "included, runs forward once more, to compare its log-probabilities with the rollout "
            "engine's"
        )
    for name, model in (("student", plan.student), ("teacher", plan.teacher)):
        if model.architecture.moe is not None:
            num_experts = model.architecture.moe.num_experts
            ranks = model.parallel.expert_model_parallel_size
            lines.append(
                f"{name}: {num_experts} experts a layer, {num_experts // ranks} of them on each of "
                f"{ranks} ranks, each over {model.parallel.expert_tensor_size} ranks"
            )
    if plan.teacher_reader is not None:
        settings = config.teacher_prompt
        what = [
            *(["its own tokens"] if settings.tokenizer == "own" else []),
            *([f"the column {settings.privileged_key}"] if settings.privileged_key else []),
            *(["its own prompt"] if settings.suffix or settings.chat_template_kwargs else []),
        ]
        lines.append(f"the teacher reads {' and '.join(what)}")
    for number, one in enumerate(plan.others, start=1):
        matches = ", ".join(f"{pair.student} -> {pair.teacher}" for pair in one.pairs)
        layers = ", ".join(map(str, one.teacher.extent.layers_per_stage))
        lines.append(
            f"extra teacher {number}, {one.config.model.teacher}: {matches}; layers of each stage: "
            f"{layers}"
        )
    if plan.bridge is not None:
        lines.append(f"bridge {config.bridge.path}: {plan.bridge_rank} numbers of each state")
    return "\n".join(lines)


def _layers(start: int, count: int) -> str:
    if count == 0:
        return "no layers"
    return f"layer {start}" if count == 1 else f"layers {start}-{start + count - 1}"


def _benchmarks(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, student: Architecture
) -> list[Benchmark]:
    evaluation = config.evaluation
    if evaluation.interval is None:
        return []
    benchmarks = load_benchmarks(
        [Path(file) for file in evaluation.data],
        limit=evaluation.limit,
        instruction=evaluation.instruction,
        setting="evaluation.data",
    )
    for benchmark in benchmarks:
        check_length(
            benchmark.name,
            tokenized(benchmark, tokenizer, chat_format_of_benchmarks(config)),
            evaluation.max_new_tokens,
            student.max_position_embeddings,
            setting="evaluation.max_new_tokens",
        )
    return benchmarks


def _check_output_dir(config: RunConfig) -> None:
    existing = Path(config.output_dir).absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        # Whether something can be made there is known when it was: access rights do not say it of
        # a read-only file system.
        with tempfile.TemporaryDirectory(prefix=".megatron_oprd-", dir=existing):
            pass
        # A name that is too long for the file system, or for none.
        Path(config.output_dir).exists()
    except (OSError, ValueError) as error:
        raise UserError(
            f"output_dir = {config.output_dir}: {existing} is no folder that can be written to "
            f"({error.strerror if isinstance(error, OSError) else error})"
        ) from error
    # Whether a student that is there is this run's own is known when the run is: see resume.
    check_output_folder(export_folder(config), force=True)
    for name in ("student", "teacher"):
        model = Path(getattr(config.model, name))
        if export_folder(config).resolve() in (model.resolve(), *model.resolve().parents):
            raise UserError(
                f"output_dir = {config.output_dir}: the student would be written to "
                f"{export_folder(config)}, which is or holds model.{name} = {model}; give another "
                "output_dir"
            )
