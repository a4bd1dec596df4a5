"""A step in words, for the terminal and for logs."""

import datetime
from collections.abc import Mapping
from typing import Any

# Phases by their metrics. They follow one another, so that their shares of a step add up.
_PHASES = {
    "rollout": "seconds_rollout",
    "teacher": "seconds_teacher",
    "student": "seconds_student",
    "optimizer": "seconds_optimizer",
    "weight sync": "seconds_weight_sync",
}
_WATCHED = ("loss", "cosine", "grad_norm", "eval_score")


def step_fields(
    metrics: Mapping[str, Any], *, steps_left: int, seconds_left: float
) -> dict[str, str]:
    """What a step says, by names; the order is that of reading.

    Args:
        metrics: The step's metrics, as in ``metrics.jsonl``.
        steps_left: Steps of the run that come after it.
        seconds_left: The time that they will take.
    """
    fields = {"step": str(metrics["step"])}
    for name in _WATCHED:
        # eval_score is a metric of the steps that are evaluated only.
        if name in metrics:
            fields[name] = "-" if metrics[name] is None else f"{metrics[name]:.4g}"
    fields["time"] = f"{metrics['seconds_step']:.3g} s ({_shares(metrics)})"
    fields["tokens/s"] = f"{metrics['tokens_per_second']:.4g}"
    if metrics["rollout_tokens_per_second"] is not None:
        fields["rollout tokens/s"] = f"{metrics['rollout_tokens_per_second']:.4g}"
    fields["memory"] = f"{metrics['peak_memory_gb']:.3g} GB"
    if metrics["tflops_per_gpu"] is not None:
        fields["TFLOP/s per GPU"] = f"{metrics['tflops_per_gpu']:.3g}"
    if metrics["mfu"] is not None:
        fields["MFU"] = f"{metrics['mfu']:.1%}"
    left = datetime.timedelta(seconds=round(seconds_left))
    fields["left"] = f"{steps_left} steps, {left}"
    return fields


def step_line(fields: Mapping[str, str]) -> str:
    """`step_fields` on one line of a log."""
    return "  ".join(f"{name} {value}" for name, value in fields.items())


def _shares(metrics: Mapping[str, Any]) -> str:
    seconds = {phase: metrics[name] for phase, name in _PHASES.items()}
    # Loading, logging, and the comparison of log-probabilities.
    seconds["other"] = max(0.0, metrics["seconds_step"] - sum(seconds.values()))
    return ", ".join(f"{phase} {of / metrics['seconds_step']:.0%}" for phase, of in seconds.items())
