"""Recommended layouts as a table, with the settings to paste."""

from typing import Literal

from rich.console import Console
from rich.table import Table

from megatron_oprd.errors import UserError
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.ranking import Candidate, off_policy
from megatron_oprd.planning.report import in_time
from megatron_oprd.planning.staleness import OtherPolicy
from megatron_oprd.planning.time import StepSeconds

_PHASES = ("rollout", "teacher", "student", "update", "other")


def print_recommended(
    console: Console,
    found: list[Candidate],
    other: OtherPolicy | None,
    hardware: Hardware,
    *,
    num_gpus: int,
) -> None:
    """Prints the table and each layout's settings; raises UserError if no layout fits.

    Layouts of the other policy come last, below a line.
    """
    of_other = [] if other is None else other.found
    if not (found or of_other):
        raise UserError(
            f"no layout of {num_gpus} GPUs (--gpus) with {hardware.memory_gb:g} GB (--gpu-memory) "
            "fits or is allowed by the settings; take more GPUs, teacher.precision = fp8, "
            "teacher.target_memory_gb, or smaller batches, responses or models. plan without "
            "--recommend says what the layout of the settings lacks"
        )
    console.print(_table(found, of_other, hardware, num_gpus=num_gpus))
    for number, one in enumerate([*found, *of_other], start=1):
        # Not wrapped, so that it can be pasted.
        settings = str(one.change) or "(the settings as they are)"
        console.print(f"{number}: {settings}", soft_wrap=True)
    if other is not None and not of_other:
        console.print(f"{other.change}: {_why_none(other)}", soft_wrap=True)


def _why_none(other: OtherPolicy) -> str:
    if other.refusal:
        return f"not compared, as the settings do not allow it: {other.refusal}"
    return "no layout with it fits and gains 2% of a step"


def _table(
    found: list[Candidate], of_other: list[Candidate], hardware: Hardware, *, num_gpus: int
) -> Table:
    rows = [*found, *of_other]
    caption = (
        f"GB of {hardware.memory_gb:g}; other: weight sync, copies to the host. Recompute and each "
        "offload have to gain 2% of a step; of layouts within 2% those that leave a tenth of the "
        "memory come first"
    )
    if any(one.seconds.overlaps for one in rows):
        caption += (
            ". Off-policy: a step's rollouts are of weights that are an update older, and are "
            "counted as if they and the training beside them did not slow each other"
        )
    table = Table(title=f"Layouts of {num_gpus} GPUs by the time of a step", caption=caption)
    for name in ("", "layout", "GB", "step", *_PHASES, "bound by", "loses"):
        is_text = name in ("layout", "bound by", "loses")
        table.add_column(name, justify="left" if is_text else "right")
    for number, one in enumerate(rows, start=1):
        seconds = phases(one.seconds)
        table.add_row(
            str(number),
            layout_name(one),
            f"{one.peak_bytes / 1e9:.1f}",
            in_time(one.seconds.total),
            *(in_time(seconds[phase]) for phase in _PHASES),
            bound_by(one.seconds),
            "" if number == 1 else loses(one.seconds, rows[0].seconds),
            end_section=number == len(found),
        )
    return table


def layout_name(candidate: Candidate) -> str:
    """The sizes of a layout that are above 1, in short, with recompute, offload and staleness."""
    layout = candidate.memory.layout
    config, parallel = layout.config, layout.config.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "DP": layout.data_parallel_size,
    }
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1] or ["one GPU"]
    engine = candidate.memory.engine
    if engine is not None and engine.num_gpus > 1:
        words.append(f"engine {engine.num_gpus}")
    if config.recompute.recompute_granularity is not None:
        words.append(f"{config.recompute.recompute_granularity} recompute")
    if config.teacher.offload != "none":
        words.append("teacher offloaded")
    if config.optimizer.offload_states:
        words.append("states offloaded")
    if config.rollout.max_staleness:
        words.append(off_policy(config.rollout.max_staleness))
    return ", ".join(words)


def phases(seconds: StepSeconds) -> dict[str, float]:
    """Seconds by the table's columns."""
    return {
        "rollout": seconds.rollout,
        "teacher": seconds.teacher.total,
        "student": seconds.student.total,
        "update": seconds.update,
        "other": seconds.sync + seconds.copies,
    }


def bound_by(seconds: StepSeconds) -> str:
    """The largest part of the step and its share.

    Of rollouts beside training (`StepSeconds.overlaps`) only the longer one has such a part.
    """
    of_rollout = {"prefill": seconds.prefill, "decoding": seconds.decode}
    of_training = {
        "FLOPs": seconds.teacher.compute + seconds.student.compute,
        "tensor-parallel messages": seconds.teacher.tensor + seconds.student.tensor,
        "context-parallel messages": seconds.teacher.context + seconds.student.context,
        "tokens to experts": seconds.teacher.experts + seconds.student.experts,
        "pipeline messages": seconds.teacher.pipeline + seconds.student.pipeline,
        "pipeline bubble": seconds.teacher.bubble + seconds.student.bubble,
        "gradients and parameters": seconds.gradients + seconds.parameters,
        "optimizer": seconds.optimizer,
        "copies to the host": seconds.copies,
    }
    parts = {"weight sync": seconds.sync}
    if not _is_hidden("rollout", seconds):
        parts |= of_rollout
    if not _is_hidden("training", seconds):
        parts |= of_training
    name = max(parts, key=lambda part: parts[part])
    return f"{name} {parts[name] / seconds.total:.0%}"


def loses(seconds: StepSeconds, first: StepSeconds) -> str:
    """By how much a layout is slower than the first, and the phase that costs most of it.

    A faster one gains too little to come first, by settings that save memory or at the cost of
    memory; or it is off-policy.
    """
    if seconds.total < first.total:
        return f"nothing: {in_time(first.total - seconds.total)} faster"
    hidden = "rollout" if _is_hidden("rollout", seconds) else None
    shown = {"rollout", "other"} if _is_hidden("training", seconds) else {*_PHASES} - {hidden}
    before, now = phases(first), phases(seconds)
    more = {name: now[name] - before[name] for name in _PHASES if name in shown}
    name = max(more, key=lambda phase: more[phase])
    return f"{in_time(seconds.total - first.total)}: {name} +{in_time(more[name])}"


def _is_hidden(part: Literal["rollout", "training"], seconds: StepSeconds) -> bool:
    """Whether a part of the step goes on beside a longer one."""
    if not seconds.overlaps:
        return False
    return (part == "rollout") == (seconds.rollout < seconds.training)
