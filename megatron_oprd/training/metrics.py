"""The metrics of a step, by the names that they have in ``metrics.jsonl``."""

from collections.abc import Sequence
from typing import Any

from megatron_oprd.distill.coefficients import coefficient_at
from megatron_oprd.rollout.engine import EngineUse, Rollout
from megatron_oprd.rollout.pool import EngineWork
from megatron_oprd.training.layout import RunLayout
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.training.rollout_source import StepRollouts
from megatron_oprd.training.step import StepResult
from megatron_oprd.training.surplus import SurplusUse


def step_metrics(result: StepResult, plan: RunPlan, step: int) -> dict[str, Any]:
    """Losses, cosines, gradient, and the seconds of the phases."""
    layers = [str(pair.student) for pair in plan.layout.pairs]
    output_loss = plan.config.output_loss
    return {
        "loss": result.loss,
        "loss_coefficient": coefficient_at(plan.config.loss, step),
        "output_loss": result.output_loss,
        "output_loss_coefficient": (
            coefficient_at(output_loss, step) if plan.config.compares_outputs else None
        ),
        "cosine": _mean(result.cosine_per_layer),
        "loss_per_layer": dict(zip(layers, result.loss_per_layer, strict=True)),
        "loss_share_per_layer": dict(
            zip(layers, _shares(plan.layout, result.loss_per_layer, step), strict=True)
        ),
        "cosine_per_layer": dict(zip(layers, result.cosine_per_layer, strict=True)),
        **_extra_teacher_metrics(result, plan),
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "skipped": result.skipped,
        "seconds_teacher": result.seconds_teacher,
        "seconds_student": result.seconds_student,
        "seconds_optimizer": result.seconds_optimizer,
    }


def _shares(layout: RunLayout, losses: Sequence[float | None], step: int) -> Sequence[float | None]:
    """The share of each pair in a teacher's loss on hidden states; None if the loss is 0."""
    weighted = [
        None if loss is None else coefficient * loss
        for coefficient, loss in zip(layout.pair_coefficients(step), losses, strict=True)
    ]
    total = sum(one for one in weighted if one is not None)
    return [one / total if one is not None and total else None for one in weighted]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _extra_teacher_metrics(result: StepResult, plan: RunPlan) -> dict[str, Any]:
    metrics = {}
    for number, (one, (loss, cosine)) in enumerate(
        zip(plan.teachers[1:], result.extra_teachers, strict=True), start=1
    ):
        layers = [str(pair.student) for pair in one.layout.pairs]
        metrics[f"teacher{number}_loss_per_layer"] = dict(zip(layers, loss, strict=True))
        metrics[f"teacher{number}_cosine_per_layer"] = dict(zip(layers, cosine, strict=True))
    return metrics


def pass_metrics(
    result: StepResult, *, world_size: int, peak_tflops: float | None
) -> dict[str, float | None]:
    """The rate of the models' passes; None without passes, and the MFU without a known peak."""
    seconds = result.seconds_teacher + result.seconds_student
    if not seconds:
        return {"tflops_per_gpu": None, "mfu": None}
    rate = result.flops / seconds / world_size / 1e12
    return {"tflops_per_gpu": rate, "mfu": None if peak_tflops is None else rate / peak_tflops}


def rollout_metrics(rollouts: list[Rollout], step: int) -> dict[str, Any]:
    """Lengths, ages and tokens of the step's responses."""
    lengths = [rollout.num_written for rollout in rollouts]
    staleness = [step - rollout.weights_version for rollout in rollouts]
    return {
        "response_length_mean": sum(lengths) / len(lengths),
        "response_length_max": max(lengths),
        "finished_share": sum(rollout.finished for rollout in rollouts) / len(rollouts),
        "paired_share": _paired_share(rollouts),
        # Updates between the oldest weights of a rollout and those that are trained on it.
        "rollout_staleness": max(staleness),
        "rollout_staleness_counts": {
            str(age): staleness.count(age) for age in sorted(set(staleness))
        },
        "num_tokens": sum(
            len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts
        ),
        **_function_metrics(rollouts),
    }


def _function_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Means of what ``rollout.function`` measured, over the responses that have the number."""
    found: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in rollout.metrics:
            found.setdefault(f"function/{name}", []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def engine_metrics(of_step: StepRollouts) -> dict[str, Any]:
    """What generation and weight sync cost; None for what the engines did not measure."""
    seconds = of_step.seconds_weight_sync
    metrics: dict[str, Any] = {
        "weight_sync_gb": of_step.weight_sync_bytes / 1e9,
        "seconds_weight_sync": seconds,
        "weight_sync_gb_per_second": (
            of_step.weight_sync_bytes / 1e9 / seconds if of_step.weight_sync_bytes else None
        ),
        "seconds_rollout": of_step.seconds_rollout,
        "rollout_tokens_per_second": None,
        "rollout_idle_share": None,
        "rollout_tokens_per_second_of_engine": {},
        "rollout_kv_cache_peak_of_engine": {},
        "rollout_preemptions": None,
        "rollout_queue_seconds": None,
    }
    return metrics | _work_metrics(of_step.work)


def _work_metrics(work: Sequence[EngineWork]) -> dict[str, Any]:
    """How fast and how busy engines were; empty if they have generated nothing since the last step.

    Rollouts in the background take the time that the engines, or the servers, measure themselves.
    """
    uses = [one.use for one in work if one.use is not None]
    busy = [seconds for use in uses for seconds in use.busy_seconds]
    waited = max(one.seconds for one in work)
    longest = waited or max(busy, default=0.0)
    tokens = sum(one.tokens for one in work)
    if not tokens or not longest:
        return {}
    busy = busy or [one.seconds for one in work]
    # Of the time until the last one has finished; in the background, of the step's.
    window = waited or max(one.window for one in work)
    return {
        "rollout_tokens_per_second": tokens / longest,
        "rollout_idle_share": max(0.0, 1 - sum(busy) / len(busy) / window),
        "rollout_tokens_per_second_of_engine": {
            str(i): one.tokens / seconds if one.tokens and (seconds := _seconds(one)) else None
            for i, one in enumerate(work)
        },
        **_use_metrics(uses),
    }


def _seconds(work: EngineWork) -> float:
    """The time that an engine generated; 0 if only servers that it shares know."""
    of_engine = () if work.use is None else work.use.busy_seconds
    return work.seconds or (of_engine[0] if len(of_engine) == 1 else 0.0)


def surplus_metrics(use: SurplusUse | None) -> dict[str, Any]:
    """What became of the responses that a step did not use; none without ``oversample``."""
    if use is None:
        return {}
    return {
        "rollout_stopped": use.stopped,
        "rollout_dropped": use.dropped,
        "rollout_dropped_tokens": use.dropped_tokens,
        "rollout_longest_wait": use.longest_wait,
    }


def _use_metrics(uses: Sequence[EngineUse]) -> dict[str, Any]:
    """How full engines, or servers, were; empty if none says."""
    if not uses:
        return {}
    peaks = [peak for use in uses for peak in use.kv_cache_peaks]
    responses = sum(one.num_responses for one in uses)
    return {
        "rollout_kv_cache_peak_of_engine": {str(i): peak for i, peak in enumerate(peaks)},
        "rollout_preemptions": sum(one.preemptions for one in uses),
        "rollout_queue_seconds": (
            sum(one.queued_seconds for one in uses) / responses if responses else None
        ),
    }


def _paired_share(rollouts: list[Rollout]) -> float | None:
    """The share of the student's response tokens with a counterpart in the teacher's tokens."""
    if all(rollout.teacher is None for rollout in rollouts):
        return None
    paired = sum(
        one.written is None or one.written[of_student]
        for one in rollouts
        if one.teacher is not None
        for of_student, _ in one.teacher.pairs
    )
    return paired / sum(one.num_written for one in rollouts)
