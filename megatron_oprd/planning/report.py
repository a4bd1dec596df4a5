"""A plan as tables for the terminal, and as JSON."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_oprd.distill.trainable_projectors import num_parameters
from megatron_oprd.errors import UserError
from megatron_oprd.models.build import DTYPES
from megatron_oprd.planning.checkpoint import checkpoint_bytes
from megatron_oprd.planning.engine import (
    engine_of,
    engine_place,
    num_engines,
    responses_of_engine,
)
from megatron_oprd.planning.estimate import MemoryEstimate, WorkEstimate
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.memory import ITEMS, PHASES, RankMemory, teacher_bytes
from megatron_oprd.planning.parameters import count_parameters
from megatron_oprd.planning.time import PassSeconds
from megatron_oprd.rollout.registry import ENGINES
from megatron_oprd.training.layout import ModelLayout, RunLayout

_GB = 1e9


def print_plan(
    console: Console, memory: MemoryEstimate, work: WorkEstimate, hardware: Hardware
) -> None:
    """Prints all tables of the plan."""
    console.print(summary(memory, work))
    for table in (
        placement_table(memory.layout),
        memory_table(memory, hardware),
        items_table(memory),
        messages_table(work),
        work_table(memory.layout, work, hardware),
    ):
        # One GPU sends nothing, for example.
        if table.row_count:
            console.print(table)
    if memory.layout.config.checkpoint.is_on:
        console.print(checkpoint_line(memory.layout, hardware))
    fullest = memory.fullest
    if memory.fits(hardware):
        console.print(
            f"it fits: {in_bytes(fullest.peak_bytes)} of {hardware.memory_gb:g} GB at the peak, "
            f"the {fullest.peak_phase} phase on {rank_name(fullest, memory.layout)}"
        )


def summary(memory: MemoryEstimate, work: WorkEstimate) -> str:
    """Describes the run in a few lines."""
    layout, largest = memory.layout, memory.largest
    config = layout.config
    student, teacher = layout.student.architecture, layout.teacher.architecture
    precision: str = config.teacher.precision
    if precision == "fp8":
        precision += f" ({config.teacher.fp8_recipe})"
    lines = [
        _groups_of_ranks(layout),
        f"recompute {config.recompute.recompute_granularity or 'none'}; teacher {precision}, "
        f"offload {config.teacher.offload}",
        f"a replica's step: {largest.num_sequences} sequences of at most "
        f"{largest.prompt_tokens} + {largest.response_tokens} tokens in "
        f"{largest.num_micro_batches} micro-batches of at most {largest.micro_batch_size}"
        f"{_read_together(memory)}{_turns(memory)}",
    ]
    if others := memory.others:
        lines.append(
            f"{len(others)} more teachers: they are counted in memory, FLOPs and times; the tables "
            "of layers and messages are of the first"
        )
    if config.teacher_prompt.is_own:
        lines.append(
            "the teacher reads sequences of its own, of at most "
            f"{layout.teacher_max_sequence_length} tokens"
        )
    if layout.bridge_rank is not None:
        lines.append(f"targets behind the bridge: {layout.bridge_rank} numbers each")
    elif layout.trains_projectors:
        of_one = num_parameters(
            config.bridge,
            student_width=student.hidden_size,
            teacher_width=teacher.hidden_size,
        )
        lines.append(
            f"projectors that train: {len(layout.pairs)} of {of_one} parameters each, counted as "
            "the student's"
        )
    elif student.hidden_size != teacher.hidden_size:
        lines.append(
            f"the student is {student.hidden_size} wide, the teacher {teacher.hidden_size}: "
            "training needs a bridge (bridge.path, bridge.rank); without one the targets are "
            "counted at the teacher's width"
        )
    if rollouts := _rollouts(memory):
        lines.append(rollouts)
    typical = work.workload
    lines.append(
        f"messages, FLOPs and times are for {typical.prompt_tokens} + {typical.response_tokens} "
        "tokens a sequence"
    )
    return "\n".join(lines)


def placement_table(layout: RunLayout) -> Table:
    """Table of layers and parameters by pipeline rank."""
    table = Table(title="Where the layers sit")
    table.add_column("stage")
    for name in ("student", "teacher"):
        table.add_column(f"{name}'s\nlayers")
        table.add_column("parameters\non a rank", justify="right")
    table.add_column("teacher\nweights, GB", justify="right")
    itemsize = DTYPES[layout.config.model.params_dtype].itemsize
    for pp_rank in range(layout.config.parallel.pipeline_model_parallel_size):
        weights = teacher_bytes(layout, pp_rank=pp_rank, itemsize=itemsize).weights
        row = [str(pp_rank)]
        for model in (layout.student, layout.teacher):
            counts = count_parameters(layout, model, pp_rank)
            row += [_layers(layout, model, pp_rank), f"{counts.total / 1e6:,.1f} M"]
        table.add_row(*row, _gb(weights))
    return table


def memory_table(memory: MemoryEstimate, hardware: Hardware) -> Table:
    """Table with a row per rank and a column per phase."""
    unit, size = _unit(rank.peak_bytes for rank in memory.ranks)
    table = Table(
        title=f"Memory of a rank in each phase, {unit}",
        caption=f"10^9 bytes are a GB; {hardware.memory_gb:g} GB a GPU",
    )
    table.add_column("rank")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    table.add_column("peak in")
    for rank in memory.ranks:
        table.add_row(
            rank_name(rank, memory.layout),
            *(_gb(rank.bytes_in(phase), size) for phase in PHASES),
            rank.peak_phase,
            style="red" if rank.peak_bytes > hardware.memory_gb * _GB else None,
        )
    return table


def items_table(memory: MemoryEstimate) -> Table:
    """Table of the fullest rank's memory by item and phase."""
    rank = memory.fullest
    unit, of_unit = _unit([rank.peak_bytes])
    name = rank_name(rank, memory.layout)
    table = Table(title=f"What takes it on the fullest rank ({name}), {unit}")
    table.add_column("")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    for item in ITEMS:
        sizes = [rank.phases[phase].get(item, 0) for phase in PHASES]
        if any(sizes):
            table.add_row(item, *(_gb(size, of_unit) if size else "" for size in sizes))
    table.add_section()
    table.add_row("together", *(_gb(rank.bytes_in(phase), of_unit) for phase in PHASES))
    on_host = {
        "offloaded": rank.host_bytes,
        "while a checkpoint is written or read": rank.checkpoint_bytes + rank.written_once_bytes,
    }
    if any(on_host.values()):
        shown = ", ".join(f"{in_bytes(size)} {what}" for what, size in on_host.items() if size)
        table.caption = f"on the host: {shown}"
    return table


def messages_table(work: WorkEstimate) -> Table:
    """Table of bytes sent in a step, by the stage that sends most."""
    # Maximum of each kind of message; the maxima may be on different stages.
    most = {name: max(getattr(sent, name) for sent in work.sent) for name in asdict(work.sent[0])}
    unit, of_unit = _unit(most.values())
    table = Table(title=f"Sent in a step, {unit} (the stage that sends most)")
    table.add_column("")
    table.add_column("teacher", justify="right")
    table.add_column("student", justify="right")
    table.add_column("update", justify="right")
    rows = {
        "tensor parallel": (most["teacher_tp"], most["student_tp"], 0),
        "context parallel": (most["teacher_cp"], most["student_cp"], 0),
        "tokens to experts": (most["teacher_experts"], most["student_experts"], 0),
        "pipeline": (most["teacher_pp"], most["student_pp"], 0),
        "data parallel": (0, most["gradients"], most["parameters"]),
        "data parallel, experts": (0, most["expert_gradients"], most["expert_parameters"]),
        "weight sync, a whole stage": (0, 0, most["weight_sync"]),
        "weights into the engine": (0, 0, most["into_engine"]),
    }
    for name, sizes in rows.items():
        if any(sizes):
            table.add_row(name, *(_gb(size, of_unit) if size else "" for size in sizes))
    return table


def work_table(layout: RunLayout, work: WorkEstimate, hardware: Hardware) -> Table:
    """Table of FLOPs and time per phase, with what of it are messages and the pipeline's bubble."""
    table = Table(
        title="A step's work",
        caption=f"{hardware.mfu:.0%} of {hardware.tflops:g} TFLOP/s; memory {hardware.bandwidth:g} "
        f"GB/s, a node's GPUs {hardware.node_bandwidth:g}, other nodes "
        f"{hardware.network_bandwidth:g}",
    )
    for name in ("phase", "PFLOP", "time", "share", "messages", "bubble"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    seconds = work.seconds
    phases: list[tuple[str, float | None, float]] = [
        ("rollout: prompts", work.prefill, seconds.prefill),
        ("rollout: responses", work.decode, seconds.decode),
        (
            "teachers" if work.other_teachers else "teacher",
            sum(stage.teacher for stage in work.stages) + work.other_teachers,
            seconds.teacher.total,
        ),
        ("student", sum(stage.student for stage in work.stages), seconds.student.total),
        ("gradients", None, seconds.gradients),
        ("optimizer", None, seconds.optimizer),
        ("parameters", None, seconds.parameters),
        ("copies, GPU and host", None, seconds.copies),
        ("weight sync", None, seconds.sync),
    ]
    passes = {phases[2][0]: seconds.teacher, "student": seconds.student}
    for name, flops, duration in phases:
        if not duration:
            continue
        # Work is counted per replica; the table shows the run's.
        shown = "" if flops is None else f"{flops * layout.data_parallel_size / 1e15:,.3g}"
        one = passes.get(name, PassSeconds())
        parts = [one.messages, one.bubble]
        table.add_row(
            name,
            shown,
            in_time(duration),
            f"{duration / seconds.total:.0%}",
            *(in_time(part) if part else "" for part in parts),
        )
    table.add_section()
    name = "together, rollouts beside the rest" if seconds.overlaps else "together"
    table.add_row(name, "", in_time(seconds.total))
    return table


def checkpoint_line(layout: RunLayout, hardware: Hardware) -> str:
    """Size of a checkpoint, and the seconds in which it is written."""
    size = checkpoint_bytes(layout)
    nodes = -(-layout.world_size // hardware.gpus_per_node)
    seconds = size / (nodes * hardware.disk_bandwidth * _GB)
    return (
        f"a checkpoint has {in_bytes(size)}: at least {in_time(seconds)} at "
        f"{hardware.disk_bandwidth:g} GB/s from each of {nodes} nodes (--disk-bandwidth)"
    )


def as_json(memory: MemoryEstimate, work: WorkEstimate, hardware: Hardware) -> dict[str, Any]:
    """The plan in bytes, FLOPs and seconds."""
    layout = memory.layout
    pp_ranks = range(layout.config.parallel.pipeline_model_parallel_size)
    return {
        "hardware": asdict(hardware),
        "fits": memory.fits(hardware),
        "data_parallel_size": layout.data_parallel_size,
        "largest_step": asdict(memory.largest),
        "stages": [
            {
                "student_layers": _layer_numbers(layout, layout.student, pp_rank),
                "teacher_layers": _layer_numbers(layout, layout.teacher, pp_rank),
                "student_parameters": asdict(count_parameters(layout, layout.student, pp_rank)),
                "teacher_parameters": asdict(count_parameters(layout, layout.teacher, pp_rank)),
                "sent_bytes": asdict(work.sent[pp_rank]),
            }
            for pp_rank in pp_ranks
        ],
        "ranks": [
            {
                "name": rank_name(rank, layout),
                "pipeline_rank": rank.pp_rank,
                "peak_phase": rank.peak_phase,
                "peak_bytes": rank.peak_bytes,
                "phases": rank.phases,
                "host_bytes": rank.host_bytes,
                "checkpoint_bytes": rank.checkpoint_bytes,
                "written_once_bytes": rank.written_once_bytes,
            }
            for rank in memory.ranks
        ],
        **_engines_beside(memory),
        "typical_step": asdict(work.workload),
        "flops_of_a_replica": {
            "prefill": work.prefill,
            "decode": work.decode,
            "stages": [asdict(stage) for stage in work.stages],
        },
        "seconds": asdict(work.seconds) | {"total": work.seconds.total},
        "checkpoint_bytes": checkpoint_bytes(layout),
    }


def _engines_beside(memory: MemoryEstimate) -> dict[str, dict[str, Any] | None]:
    """Engine -> its memory on the trainer's GPUs; None for one that the run does not have there.

    Engines that generate in the trainer's process are left out.
    """
    own, name = memory.engine, engine_of(memory.layout).name
    return {
        kind.name: asdict(own) if own is not None and kind.name == name else None
        for kind in ENGINES.values()
        if kind.has_processes
    }


def write_json(file: Path, plan: dict[str, Any]) -> None:
    """Writes the plan of `as_json`; raises UserError if the file cannot be written."""
    try:
        file.write_text(json.dumps(plan, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json {file}: cannot be written: {error.strerror}") from error


def rank_name(rank: RankMemory, layout: RunLayout) -> str:
    """A rank's name in tables and messages."""
    names = []
    if layout.config.parallel.pipeline_model_parallel_size > 1:
        names.append(f"stage {rank.pp_rank}")
    if rank.owns_engine:
        names.append("engine's owner")
    elif rank.has_engine:
        names.append(f"with {engine_of(layout).title}")
    return ", ".join(names) or "others"


def _groups_of_ranks(layout: RunLayout) -> str:
    parallel = layout.config.parallel
    sizes = {
        "tensor": parallel.tensor_model_parallel_size,
        "context": parallel.context_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "data": layout.data_parallel_size,
    }
    text = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1"
    text = f"{math.prod(sizes.values())} GPUs = {text}"
    if parallel.sequence_parallel:
        text += ", sequence parallel"
    if parallel.virtual_pipeline_model_parallel_size is not None:
        text += f", {parallel.virtual_pipeline_model_parallel_size} chunks a pipeline rank"
    if parallel.expert_model_parallel_size > 1:
        text += f", experts over {parallel.expert_model_parallel_size}"
    return text


def _rollouts(memory: MemoryEstimate) -> str | None:
    """Describes an engine outside of the trainer's process; None if it is inside."""
    title = engine_of(memory.layout).title
    if engine_place(memory.layout) == "trainer":
        return None
    if (engine := memory.engine) is None:
        return f"rollouts come from a {title} server, whose memory and time are not counted"
    gpus = "a GPU" if engine.num_gpus == 1 else f"each of {engine.num_gpus} GPUs"
    asleep = "and does not sleep"
    if engine.sleeps:
        of_host = f" and {_gb(engine.host_bytes)} of the host's" if engine.host_bytes else ""
        asleep = f"{_gb(engine.context)} GB{of_host} asleep"
    responses = responses_of_engine(memory.layout, memory.largest)
    return (
        f"{title}: {num_engines(memory.layout)} engines; one takes {_gb(engine.awake)} GB of "
        f"{gpus} awake, {asleep}; its KV cache holds {engine.num_tokens:,} tokens, "
        f"{engine.num_responses} of its {responses} responses at once"
    )


def _read_together(memory: MemoryEstimate) -> str:
    largest = memory.largest
    if memory.layout.config.teacher.max_tokens is None:
        return ""
    return (
        f", the teacher's in {largest.teacher_num_micro_batches} of at most "
        f"{largest.teacher_micro_batch_size}"
    )


def _turns(memory: MemoryEstimate) -> str:
    largest = memory.largest
    if largest.group_size == largest.num_micro_batches:
        return ""
    return f", teacher and student taking turns every {largest.group_size}"


def _layers(layout: RunLayout, model: ModelLayout, pp_rank: int) -> str:
    runs = []
    for stage in layout.stages_of_rank(pp_rank):
        layers = model.extent.layers_of_stage(stage)
        if len(layers) > 1:
            runs.append(f"{layers[0]}-{layers[-1]}")
        elif layers:
            runs.append(str(layers[0]))
    return ", ".join(runs) or "none"


def _layer_numbers(layout: RunLayout, model: ModelLayout, pp_rank: int) -> list[int]:
    stages = layout.stages_of_rank(pp_rank)
    return [layer for stage in stages for layer in model.extent.layers_of_stage(stage)]


def in_time(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:,.{1 if seconds < 100 * size else 0}f} {unit}"
    return f"{seconds * 1e6:.3g} us" if seconds else "0 s"


def in_bytes(num_bytes: float) -> str:
    """A size in the unit that suits it."""
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    for unit, size in units:
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _unit(sizes: Iterable[float]) -> tuple[str, float]:
    """The unit of a table in which these sizes stand: the largest is above 1."""
    most = max(sizes, default=0)
    return next((one for one in (("GB", 1e9), ("MB", 1e6)) if most >= one[1]), ("kB", 1e3))


def _gb(num_bytes: float, unit: float = _GB) -> str:
    """A size in a unit, by default GB."""
    number = num_bytes / unit
    # Two significant digits for sizes that one decimal would show as 0.0.
    return f"{number:.1f}" if number >= 0.05 or number == 0 else f"{number:.2g}"
