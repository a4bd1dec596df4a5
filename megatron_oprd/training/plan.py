"""Plans and checks a run from configurations and file headers; reads no weights."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from transformers import PreTrainedTokenizerBase

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
from megatron_oprd.rollout.function import UserFunction
from megatron_oprd.rollout.registry import engine_kind
from megatron_oprd.training.layout import (
    RunLayout,
    check_coefficients,
    make_layout,
    matched_layers,
)
from megatron_oprd.training.reading import (
    chat_format_of_benchmarks,
    check_prompts,
    student_tokenizer,
    teacher_reader,
)
from megatron_oprd.weights.output_folder import check_output_folder
from megatron_oprd.weights.source import WeightSource


@dataclass(frozen=True, kw_only=True)
class TeacherPlan:
    """One teacher of a run."""

    # The student and this teacher, placed; its config is the run with this teacher alone.
    layout: RunLayout
    checkpoint: WeightSource
    bridge: BridgeSource | None  # None compares hidden states directly
    reader: TeacherReader | None  # None if it reads the student's sequences

    def projectors(self, context: ParallelContext) -> Projectors | None:
        """Reads the projectors of this rank's layers; None without a bridge."""
        if self.bridge is None:
            return None
        assert self.layout.bridge_rank is not None
        return self.bridge.read(
            self.layout.pairs_of_rank(context.pp_rank),
            rank=self.layout.bridge_rank,
            device=context.device,
        )


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A whole run."""

    student_checkpoint: WeightSource
    teachers: tuple[TeacherPlan, ...]  # ``model.teacher`` first
    tokenizer: PreTrainedTokenizerBase  # the student's
    benchmarks: list[Benchmark]  # of the evaluation during the run
    function: UserFunction | None = None  # makes the rollouts; None: the engine alone

    @property
    def layout(self) -> RunLayout:
        """The student and the first teacher, placed."""
        return self.teachers[0].layout

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return self.layout.config

    def with_config(self, config: RunConfig) -> Self:
        """The plan with other settings that do not affect the layout, such as the schedule."""
        first = replace(self.teachers[0], layout=replace(self.layout, config=config))
        return replace(self, teachers=(first, *self.teachers[1:]))


def export_folder(config: RunConfig) -> Path:
    """The folder that the distilled student is written to at the end."""
    return Path(config.output_dir) / "student"


def make_plan(config: RunConfig, *, world_size: int, builds_bridge: bool = False) -> RunPlan:
    """Plans a run for ``world_size`` processes from configurations and file headers.

    With ``builds_bridge`` hidden states need not be comparable, and no student is written.

    Raises:
        UserError: A model, a tokenizer, the bridge or the prompts cannot be used, or the settings
            do not fit the models or the number of processes.
    """
    if not builds_bridge:
        _check_output_dir(config)
    models = open_models(config)
    layouts = place(models, world_size=world_size)
    check(models, layouts, builds_bridge=builds_bridge)
    return read(models, layouts)


@dataclass(frozen=True, kw_only=True)
class OpenedTeacher:
    """A teacher whose weights have not been read; ``config`` is the run with this teacher alone."""

    config: RunConfig
    opened: OpenedCheckpoint
    bridge: BridgeSource | None


@dataclass(frozen=True, kw_only=True)
class OpenedModels:
    """The models of a run with their configurations and file headers."""

    student: OpenedCheckpoint
    teachers: list[OpenedTeacher]


def open_models(config: RunConfig) -> OpenedModels:
    """Opens every checkpoint and bridge of a run once; raises a UserError if one cannot be used."""
    engine_kind(config.rollout).check_installed(config.rollout)
    student = open_checkpoint(
        Path(config.model.student),
        hf_config=_path(config.model.student_hf_config),
        hf_setting="model.student_hf_config",
    )
    teachers = []
    for number, one in enumerate([config, *(alone(config, x) for x in config.extra_teachers)]):
        with _naming(number):
            opened = open_checkpoint(
                Path(one.model.teacher),
                hf_config=_path(one.model.teacher_hf_config),
                hf_setting="model.teacher_hf_config",
            )
            bridge = None if one.bridge.path is None else open_bridge(Path(one.bridge.path))
            teachers.append(OpenedTeacher(config=one, opened=opened, bridge=bridge))
    return OpenedModels(student=student, teachers=teachers)


def alone(config: RunConfig, extra: ExtraTeacherConfig) -> RunConfig:
    """The run with an extra teacher as its only teacher."""
    return replace(
        config,
        model=replace(config.model, teacher=extra.model, teacher_hf_config=extra.hf_config),
        teacher=extra.as_teacher(config.teacher),
        taps=replace(config.taps, layers=extra.layers, n=extra.n, layer_map=extra.layer_map),
        loss=replace(config.loss, coefficient=extra.coefficient, layer_weights=extra.layer_weights),
        output_loss=OutputLossConfig(),
        bridge=BridgeConfig(path=extra.bridge),
        evaluation=EvaluationConfig(),
        extra_teachers=[],
    )


def place(models: OpenedModels, *, world_size: int) -> list[RunLayout]:
    """Places the student with each of its teachers. Reads no file.

    Raises:
        UserError: The settings do not fit the models or the number of processes.
    """
    teachers = []
    for number, one in enumerate(models.teachers):
        with _naming(number):
            rank = None if one.bridge is None else _bridge_rank(one.config, one.bridge)
        teachers.append((one.config, one.opened.architecture, rank))
    return place_teachers(models.student.architecture, teachers, world_size=world_size)


def place_teachers(
    student: Architecture,
    teachers: Sequence[tuple[RunConfig, Architecture, int | None]],
    *,
    world_size: int,
) -> list[RunLayout]:
    """`place` for architectures alone.

    ``teachers`` are, ``model.teacher`` first, the run with a teacher alone, its architecture, and
    the rank of its bridge, None without one.
    """
    # The deepest layer that any teacher needs: the student is built once, for all of them.
    running = 0
    for number, (config, teacher, _) in enumerate(teachers):
        with _naming(number):
            pairs = matched_layers(config, student, teacher)
            running = max([running, *(pair.student + 1 for pair in pairs)])
    if teachers[0][0].compares_outputs:
        running = student.num_layers
    layouts: list[RunLayout] = []
    for number, (config, teacher, bridge_rank) in enumerate(teachers):
        if layouts:
            # The first teacher's layout divides the student's layers over the stages; the others
            # follow.
            stages = list(layouts[0].student.extent.layers_per_stage)
            parallel = replace(config.parallel, num_layers_per_stage=stages)
            config = replace(config, parallel=parallel)
        with _naming(number):
            layouts.append(
                make_layout(
                    config,
                    student=student,
                    teacher=teacher,
                    world_size=world_size,
                    min_running_layers=running,
                    bridge_rank=bridge_rank,
                )
            )
    return layouts


def check(models: OpenedModels, layouts: Sequence[RunLayout], *, builds_bridge: bool) -> None:
    """Checks the settings against the placed models.

    Raises:
        UserError: A setting does not fit, or a checkpoint has other tensors than its model.
    """
    student = models.student
    _check_max_model_len(models.teachers[0].config, student.architecture)
    student.check_tensors()
    for number, (one, layout) in enumerate(zip(models.teachers, layouts, strict=True)):
        with _naming(number):
            teacher = one.opened.architecture
            if one.bridge is not None:
                one.bridge.check(
                    student=student.architecture,
                    teacher=teacher,
                    pairs=layout.pairs,
                    taps=layout.config.taps,
                )
            elif layout.pairs and not builds_bridge and not layout.trains_projectors:
                _check_widths(student.architecture, teacher)
            one.opened.check_tensors()
    check_coefficients(layouts)


def read(models: OpenedModels, layouts: Sequence[RunLayout]) -> RunPlan:
    """Reads tokenizers, benchmarks and the beginning of the prompts, which complete the plan.

    Raises:
        UserError: A file cannot be used.
    """
    config = models.teachers[0].config
    source = models.student.source
    tokenizer = student_tokenizer(layouts[0], source.hf_folder)
    teachers = []
    for number, (one, layout) in enumerate(zip(models.teachers, layouts, strict=True)):
        with _naming(number):
            reader = teacher_reader(
                layout,
                tokenizer,
                student_folder=source.hf_folder,
                teacher_folder=one.opened.source.hf_folder,
            )
        teachers.append(
            TeacherPlan(
                layout=layout, checkpoint=one.opened.source, bridge=one.bridge, reader=reader
            )
        )
    check_prompts(config, tokenizer, teachers[0].reader)
    name = config.rollout.function
    return RunPlan(
        function=None if name is None else UserFunction.load(name, tokenizer),
        student_checkpoint=source,
        teachers=tuple(teachers),
        tokenizer=tokenizer,
        benchmarks=_benchmarks(config, tokenizer, models.student.architecture),
    )


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Names an extra teacher in errors about it; number 0 is ``model.teacher`` itself."""
    try:
        yield
    except UserError as error:
        if number == 0:
            raise
        raise UserError(f"extra_teachers[{number - 1}], as a teacher alone: {error}") from error


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _check_max_model_len(config: RunConfig, student: Architecture) -> None:
    kind, limit = engine_kind(config.rollout), student.max_position_embeddings
    found = kind.max_model_len(config.rollout)
    if found is not None and limit is not None and found > limit:
        raise UserError(
            f"{kind.setting('max_model_len')} = {found} is more than model.student's "
            f"{student.length_field} = {limit}; give at most that"
        )


def _check_widths(student: Architecture, teacher: Architecture) -> None:
    if student.hidden_size != teacher.hidden_size:
        raise UserError(
            f"model.student is {student.hidden_size} wide and model.teacher "
            f"{teacher.hidden_size}, but hidden states can be compared directly only at equal "
            "width. For other widths build a bridge (OPRD-Bridge, frozen projectors) with "
            "torchrun ... -m megatron_oprd.build_bridge --config bridge.yaml, and give its folder "
            "as bridge.path; or train projectors with the student (bridge.trainable)"
        )


def _bridge_rank(config: RunConfig, bridge: BridgeSource) -> int:
    settings = config.bridge
    rank = bridge.rank if settings.rank is None else settings.rank
    if not 2 <= rank <= bridge.rank:
        raise UserError(
            f"bridge.rank = {settings.rank} is not between 2 and {bridge.rank}, the directions of "
            f"bridge.path = {settings.path} (of a single direction a unit vector keeps only the "
            "sign); give a rank between them"
        )
    return rank


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
        # Tried out, because access rights say nothing about a read-only file system.
        with tempfile.TemporaryDirectory(prefix=".megatron_oprd-", dir=existing):
            pass
        # Raises if the name is too long for the file system, or not a valid path.
        Path(config.output_dir).exists()
    except (OSError, ValueError) as error:
        raise UserError(
            f"output_dir = {config.output_dir} cannot be written, because {existing} is not a "
            "folder that can be written to "
            f"({error.strerror if isinstance(error, OSError) else error}); give another output_dir"
        ) from error
    # A student that exists may be this run's own; resume.check_export decides once the run is
    # known.
    check_output_folder(export_folder(config), force=True)
    for name in ("student", "teacher"):
        model = Path(getattr(config.model, name))
        if export_folder(config).resolve() in (model.resolve(), *model.resolve().parents):
            raise UserError(
                f"output_dir = {config.output_dir} would have the student in "
                f"{export_folder(config)}, which is or holds model.{name} = {model}; give another "
                "output_dir"
            )
