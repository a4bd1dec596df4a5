"""Describes a plan to the user, for ``--dry-run``."""

from megatron_oprd.config.load import dump_config
from megatron_oprd.distill.trainable_projectors import num_parameters
from megatron_oprd.training.plan import RunPlan


def describe(plan: RunPlan) -> str:
    """The plan as text: configuration, layer map, and the layers on each pipeline stage."""
    config, layout = plan.config, plan.layout
    pp = config.parallel.pipeline_model_parallel_size
    lines = [
        "# configuration",
        dump_config(config).rstrip(),
        "",
        f"# layer map, 0-based: student layer -> teacher layer ({len(layout.pairs)} of "
        f"{layout.student.architecture.num_layers} student layers)",
        ", ".join(f"{pair.student} -> {pair.teacher}" for pair in layout.pairs),
        "",
        f"# pipeline stages ({layout.data_parallel_size} data-parallel replicas)",
    ]
    student_end = teacher_end = 0
    counts = zip(
        layout.student.extent.layers_per_stage, layout.teacher.extent.layers_per_stage, strict=True
    )
    for stage, (of_student, of_teacher) in enumerate(counts):
        # Megatron interleaves virtual stages: stage s is chunk s // pp of rank s % pp.
        name = f"rank {stage % pp}"
        if config.parallel.virtual_pipeline_model_parallel_size is not None:
            name += f", chunk {stage // pp}"
        lines.append(
            f"{name}: student {_layers(student_end, of_student)}; "
            f"teacher {_layers(teacher_end, of_teacher)}"
        )
        student_end += of_student
        teacher_end += of_teacher
    not_run = layout.student.architecture.num_layers - layout.num_running_layers
    not_built = layout.teacher.architecture.num_layers - teacher_end
    if layout.compares_outputs:
        lines.append(
            "both models run to their LM heads, which the last stage compares: "
            f"output_loss.kind = {config.output_loss.kind}"
        )
    else:
        lines.append(
            f"student: {not_run} layers past the deepest tap and the LM head are frozen and not "
            f"run; teacher: {not_built} layers and the LM head are not built"
        )
    if config.rollout.oversample:
        lines.append(
            f"rollout.oversample = {config.rollout.oversample}: a step starts "
            f"{config.rollout.started_prompts} prompts and uses the first "
            f"{config.rollout.prompts_per_step} that are complete"
        )
    if ahead := config.rollout.max_staleness:
        lines.append(
            f"rollout.max_staleness = {ahead}: rollouts may be of weights so many updates old"
        )
    if config.rollout.logprob_check_interval is not None:
        lines.append(
            f"every {config.rollout.logprob_check_interval} steps the whole student, LM head "
            "included, runs forward once more, to compare its log-probabilities with the rollout "
            "engine's"
        )
    for name, model in (("student", layout.student), ("teacher", layout.teacher)):
        if model.architecture.moe is not None:
            num_experts = model.architecture.moe.num_experts
            ranks = model.parallel.expert_model_parallel_size
            lines.append(
                f"{name}: {num_experts} experts a layer, {num_experts // ranks} of them on each of "
                f"{ranks} ranks, each over {model.parallel.expert_tensor_size} ranks"
            )
    if plan.teachers[0].reader is not None:
        settings = config.teacher_prompt
        what = [
            *(["its own tokens"] if settings.tokenizer == "own" else []),
            *([f"the column {settings.privileged_key}"] if settings.privileged_key else []),
            *(["its own prompt"] if settings.suffix or settings.chat_template_kwargs else []),
        ]
        lines.append(f"the teacher reads {' and '.join(what)}")
    for number, teacher in enumerate(config.teachers):
        if teacher.when:
            name = f"extra teacher {number}" if number else "the teacher"
            columns = ", ".join(f"{column} = {value}" for column, value in teacher.when.items())
            lines.append(f"{name} teaches the prompts with {columns}")
    if config.data.group_by is not None:
        lines.append(f"each step has prompts of one {config.data.group_by}")
    for number, one in enumerate(plan.teachers[1:], start=1):
        matches = ", ".join(f"{pair.student} -> {pair.teacher}" for pair in one.layout.pairs)
        layers = ", ".join(map(str, one.layout.teacher.extent.layers_per_stage))
        lines.append(
            f"extra teacher {number}, {one.layout.config.model.teacher}: {matches}; layers of each "
            f"stage: {layers}"
        )
    if plan.teachers[0].bridge is not None:
        lines.append(f"bridge {config.bridge.path}: {layout.bridge_rank} numbers of each state")
    if layout.trains_projectors:
        number = num_parameters(
            config.bridge,
            student_width=layout.student.architecture.hidden_size,
            teacher_width=layout.teacher.architecture.hidden_size,
        )
        lines.append(
            f"projectors that train: {config.bridge.trainable}, {len(layout.pairs)} of {number} "
            "parameters"
        )
    return "\n".join(lines)


def _layers(start: int, count: int) -> str:
    if count == 0:
        return "no layers"
    return f"layer {start}" if count == 1 else f"layers {start}-{start + count - 1}"
