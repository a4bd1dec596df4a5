"""The training loop: sync weights, roll out, distil, log, evaluate and save."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.distill.coefficients import coefficient_at
from megatron_oprd.errors import say
from megatron_oprd.models.build import DTYPES
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.engine import EngineUse, Rollout, RolloutEngineError
from megatron_oprd.training import checkpoints
from megatron_oprd.training.alarm import CollapseAlarm
from megatron_oprd.training.checkpoints import Progress
from megatron_oprd.training.evaluation import BenchmarkEvaluator
from megatron_oprd.training.identity import RunIdentity, contents_of
from megatron_oprd.training.layout import RunLayout
from megatron_oprd.training.loggers import Loggers
from megatron_oprd.training.logprob_check import LogprobCheck
from megatron_oprd.training.plan import RunPlan, export_folder
from megatron_oprd.training.prompts import load_run_prompts, taught_by
from megatron_oprd.training.resume import (
    check_contents,
    check_export,
    resumable_checkpoint,
    with_schedule_of,
)
from megatron_oprd.training.rollout_source import RolloutSource, StepRollouts
from megatron_oprd.training.rollouts import compares_logprobs, open_engines
from megatron_oprd.training.samples import samples_of
from megatron_oprd.training.step import Distiller, StepResult
from megatron_oprd.training.stopping import StopRequests
from megatron_oprd.weights.casting import config_with_dtype
from megatron_oprd.weights.export import Exporter
from megatron_oprd.weights.hf_writer import HFContent, write_hf_folder
from megatron_oprd.weights.safetensors_file import TensorSpec


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


def train(plan: RunPlan, context: ParallelContext) -> Path | None:
    """Runs a plan to its end and exports the student.

    Returns:
        The exported Hugging Face folder; None if the run was asked to stop early (`StopRequests`).

    Raises:
        TrainingDivergedError: ``optimizer.max_skipped_in_a_row`` steps in a row were skipped.
        UserError: The run's folder belongs to another run, or to a run with other contents.
    """
    with StopRequests(plan.config.checkpoint, context) as stops:
        return _train(plan, context, stops)


def _train(plan: RunPlan, context: ParallelContext, stops: StopRequests) -> Path | None:
    output_dir = Path(plan.config.output_dir)
    resume_from = resumable_checkpoint(plan)
    identity = _identity(plan, resume_from)
    # Before anything uses the schedule's length.
    plan = with_schedule_of(plan, identity)
    config = plan.config
    prompts = load_run_prompts(plan, today=identity.date) if context.rank == 0 else []
    identity = _with_contents(identity, plan, resume_from, prompts)
    if context.rank == 0:
        # Only now that the folder is known to belong to this run.
        checkpoints.remove_unfinished(output_dir)
        if resume_from is not None:
            checkpoints.set_aside_newer(resume_from)
    distiller = Distiller(plan, context)
    exporter = Exporter(distiller.state.modules, plan.layout.student.table, context=context)
    done = Progress()
    if resume_from is not None:
        done = checkpoints.load(
            resume_from, plan, distiller.state, context=context, refresh=distiller.refresh
        )
    evaluator = BenchmarkEvaluator(plan, context, today=identity.date)
    logprob_check = LogprobCheck(distiller)
    skipped_steps, skipped_in_a_row = done.skipped_steps, 0
    unsupervised_steps = done.unsupervised_steps
    # `done` is the progress of the newest checkpoint, `reached` that of the weights in memory.
    reached = done

    def stream_weights(
        *, trainable_only: bool, wanted: bool
    ) -> Iterator[tuple[str, Tensor | None]]:
        # The newest parameters: with overlap_param_gather they arrive only in the next forward
        # pass.
        distiller.state.gather_parameters()
        return exporter.stream(trainable_only=trainable_only, wanted=wanted)

    def save() -> None:
        nonlocal done
        done = reached
        saved = checkpoints.save(
            plan,
            distiller.state,
            done,
            context=context,
            identity=identity,
            refresh=distiller.refresh,
        )
        stops.saved()
        say(f"{saved.folder}: {saved.num_bytes / 1e9:.3g} GB in {saved.seconds:.3g} s")

    def save_what_was_reached() -> str:
        if not config.checkpoint.is_on:
            return "checkpoint.save_interval is None, so that there is no checkpoint"
        if reached != done:
            save()
        elif not reached.step:
            return "no step was done, so that there is no checkpoint"
        return f"the newest checkpoint is of step {done.step}, from which the same command goes on"

    with (
        _loggers(config, context, first_step=done.step) as loggers,
        _saved_when_engines_fail(save_what_was_reached),
        open_engines(
            plan,
            context,
            stream_weights,
            frozen=exporter.frozen_names,
            log_prefix=f"{output_dir}/",
        ) as engines,
    ):
        # After the loggers, which have removed the records of steps that are done again.
        alarm = None if loggers is None else CollapseAlarm(output_dir / "metrics.jsonl")
        source = RolloutSource(plan, context, engines, prompts)
        for step in range(done.step, config.train_iters):
            started = time.perf_counter()
            torch.cuda.reset_peak_memory_stats()
            of_step = source.of_step(step)
            rollouts = taught_by(of_step.rollouts, config.teachers, seed=config.seed)
            compared: dict[str, Any] = {}
            if compares_logprobs(step, config):
                compared = logprob_check.compare(rollouts, step=step)
            # The comparison above comes first: it needs the weights that generated the rollouts.
            result = distiller.step(rollouts, step)
            distiller.refresh_teacher(step + 1)
            skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
            skipped_steps += result.skipped
            if result.loss is None:
                unsupervised_steps += 1
                say(
                    f"step {step}: none of its {len(rollouts)} responses has a position that is "
                    "supervised; nothing was updated"
                )
            reached = Progress(
                step=step + 1,
                skipped_steps=skipped_steps,
                unsupervised_steps=unsupervised_steps,
            )
            metrics = {
                "step": step,
                **_step_metrics(result, plan, step),
                **_rollout_metrics(rollouts, step),
                **compared,
                "skipped_steps": skipped_steps,
                "unsupervised_steps": unsupervised_steps,
                **_engine_metrics(of_step),
                "peak_memory_gb": _peak_memory_gb(context),
            }
            metrics["seconds_step"] = seconds = time.perf_counter() - started
            metrics["tokens_per_second"] = metrics["num_tokens"] / seconds
            try:
                if evaluator.is_due(step + 1):
                    # Rollouts for the next step may be under way in the same engines.
                    source.finish(weights_version=step + 1)
                    engines.sync(version=step + 1)
                    metrics.update(evaluator.evaluate(engines, step + 1))
                    engines.sleep()
                    if alarm is not None:
                        metrics["collapse_alarm"] = alarm.raise_for(metrics)
            finally:  # the step is done, whatever becomes of its evaluation
                metrics["rollout_engine_restarts"] = engines.take_restarts()
                if loggers is not None:
                    loggers.log(metrics)
                    if config.samples_interval and step % config.samples_interval == 0:
                        loggers.log_samples(step, samples_of(rollouts, plan.tokenizer))
            if skipped_in_a_row == config.optimizer.max_skipped_in_a_row:
                raise TrainingDivergedError(
                    f"steps {step + 1 - skipped_in_a_row} to {step} had a non-finite loss or "
                    f"gradient (last loss {result.loss}, gradient norm {result.grad_norm}); the "
                    f"newest checkpoint is of step {done.step}"
                )
            # A collective: every rank has to vote at the same point of each step.
            decision = stops.agree()
            if checkpoints.is_due(step + 1, config) or decision.saves:
                save()
            if decision.stops_on is not None:
                say(f"stopped after step {step}, on {decision.stops_on}: {save_what_was_reached()}")
                return None
    # The exporter reads parameters without a forward pass.
    distiller.state.gather_parameters()
    return _export(plan, exporter, context, identity)


def _identity(plan: RunPlan, resume_from: Path | None) -> RunIdentity:
    """The identity of the resumed run, or a new one from rank 0; the same on every rank."""
    if resume_from is not None:
        return RunIdentity.of_manifest(checkpoints.read_manifest(resume_from))
    identity = [RunIdentity.new(plan)]
    dist.broadcast_object_list(identity)
    return identity[0]


def _with_contents(
    identity: RunIdentity, plan: RunPlan, resume_from: Path | None, prompts: Sequence[Prompt]
) -> RunIdentity:
    """The identity with digests of the run's contents, computed on rank 0.

    Raises:
        UserError: A resumed run reads something else than before; on every rank.
    """
    contents: list[dict[str, str]] = [contents_of(plan, prompts) if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(contents)
    if resume_from is not None:
        check_contents(resume_from, identity, contents[0])
    return dataclasses.replace(identity, contents=contents[0])


def _loggers(
    config: RunConfig, context: ParallelContext, *, first_step: int
) -> contextlib.AbstractContextManager[Loggers | None]:
    """The run's loggers on rank 0, closed at the end; None on other ranks."""
    if context.rank != 0:
        return contextlib.nullcontext()
    loggers = Loggers(
        Path(config.output_dir),
        first_step=first_step,
        num_steps=config.train_iters,
        tensorboard=config.tensorboard,
    )
    return contextlib.closing(loggers)


@contextlib.contextmanager
def _saved_when_engines_fail(save: Callable[[], str]) -> Iterator[None]:
    """When the engines fail for good, on all ranks, saves a checkpoint and extends the error."""
    try:
        yield
    except RolloutEngineError as error:
        raise RolloutEngineError(f"{error}\n{save()}") from error


def _step_metrics(result: StepResult, plan: RunPlan, step: int) -> dict[str, Any]:
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


def _rollout_metrics(rollouts: list[Rollout], step: int) -> dict[str, Any]:
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


def _engine_metrics(of_step: StepRollouts) -> dict[str, Any]:
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
    if not of_step.work:
        return metrics
    longest = max(one.seconds for one in of_step.work)
    busy = sum(one.seconds for one in of_step.work) / len(of_step.work)
    return metrics | {
        "rollout_tokens_per_second": sum(one.tokens for one in of_step.work) / longest,
        # Of the engines' time until the last one has finished.
        "rollout_idle_share": 1 - busy / longest,
        "rollout_tokens_per_second_of_engine": {
            str(i): one.tokens / one.seconds if one.tokens else None
            for i, one in enumerate(of_step.work)
        },
        **_use_metrics([one.use for one in of_step.work]),
    }


def _use_metrics(of_engines: Sequence[EngineUse | None]) -> dict[str, Any]:
    """How full engines were; empty if one of them does not say or generated nothing."""
    found = [one for one in of_engines if one is not None]
    if len(found) < len(of_engines):
        return {}
    return {
        "rollout_kv_cache_peak_of_engine": {
            str(i): one.kv_cache_peak for i, one in enumerate(found)
        },
        "rollout_preemptions": sum(one.preemptions for one in found),
        "rollout_queue_seconds": (
            sum(one.queued_seconds for one in found) / sum(one.num_responses for one in found)
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


def _peak_memory_gb(context: ParallelContext) -> float:
    peak = torch.tensor(float(torch.cuda.max_memory_allocated()), device=context.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return float(peak) / 1e9


def _export(
    plan: RunPlan, exporter: Exporter, context: ParallelContext, identity: RunIdentity
) -> Path:
    """Writes the student as a Hugging Face folder, from rank 0."""
    out = export_folder(plan.config)
    dtype = DTYPES[plan.config.model.params_dtype]
    before = plan.student_checkpoint.config
    config = config_with_dtype(before, dtype) or before
    content = HFContent(
        tensors={
            name: TensorSpec(shape=shape, dtype=dtype)
            for mapping in plan.layout.student.table
            for name, shape in mapping.hf.items()
        },
        config=config,
        companion_files=plan.student_checkpoint.companion_files(),
        origin={
            "tool": "megatron_oprd.train",
            "run": identity.name,
            "student": plan.config.model.student,
            "teacher": plan.config.model.teacher,
            "train_iters": plan.config.train_iters,
        },
    )
    check_export(plan.config, identity)
    stream = exporter.stream(wanted=context.rank == 0)
    if context.rank == 0:
        whole = ((name, tensor) for name, tensor in stream if tensor is not None)
        write_hf_folder(out, content, whole, force=True)
    else:
        # The stream communicates, so every rank has to consume it.
        for _ in stream:
            pass
    return out
