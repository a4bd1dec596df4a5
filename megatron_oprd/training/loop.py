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
from megatron_oprd.errors import say
from megatron_oprd.models.build import DTYPES
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.parallel.devices import peak_tflops
from megatron_oprd.rollout.engine import RolloutEngineError
from megatron_oprd.rollout.function import RolloutFunctionError
from megatron_oprd.training import checkpoints
from megatron_oprd.training.alarm import CollapseAlarm
from megatron_oprd.training.checkpoints import Progress
from megatron_oprd.training.evaluation import BenchmarkEvaluator
from megatron_oprd.training.hub import push_to_hub
from megatron_oprd.training.identity import RunIdentity, contents_of
from megatron_oprd.training.loggers import JsonLogger, Logger, Loggers, TensorBoardLogger
from megatron_oprd.training.logprob_check import LogprobCheck
from megatron_oprd.training.metrics import (
    engine_metrics,
    pass_metrics,
    rollout_metrics,
    step_metrics,
    surplus_metrics,
)
from megatron_oprd.training.plan import RunPlan, export_folder
from megatron_oprd.training.profile import Profiler
from megatron_oprd.training.prompts import load_run_prompts, taught_by
from megatron_oprd.training.record import write_record
from megatron_oprd.training.resume import (
    check_contents,
    check_export,
    resumable_checkpoint,
    with_schedule_of,
)
from megatron_oprd.training.rollout_source import RolloutSource
from megatron_oprd.training.rollouts import compares_logprobs, open_engines
from megatron_oprd.training.samples import samples_of
from megatron_oprd.training.step import Distiller
from megatron_oprd.training.stopping import StopRequests
from megatron_oprd.training.terminal import TerminalLogger
from megatron_oprd.training.trackers import open_trackers
from megatron_oprd.weights.casting import config_with_dtype
from megatron_oprd.weights.expert_parts import stored_shapes
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
    with StopRequests(plan.config.checkpoint, context) as stops, contextlib.ExitStack() as stack:
        return _train(plan, context, stops, stack)


def _train(
    plan: RunPlan, context: ParallelContext, stops: StopRequests, stack: contextlib.ExitStack
) -> Path | None:
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
        write_record(plan, world_size=dist.get_world_size())
    # Before the weights are read: a server that refuses the run does so now.
    trackers = Loggers(open_trackers(config, identity) if context.rank == 0 else [])
    stack.callback(trackers.close)
    distiller = Distiller(plan, context)
    exporter = Exporter(distiller.state.modules, plan.layout.student.table, context=context)
    done = Progress()
    if resume_from is not None:
        started = time.perf_counter()
        done = checkpoints.load(
            resume_from, plan, distiller.state, context=context, refresh=distiller.refresh
        )
        seconds = time.perf_counter() - started
        say(f"resuming from step {done.step}: {resume_from} was read in {seconds:.3g} s")
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
        if loggers is not None:
            loggers.log_checkpoint(saved.folder, done.step)
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
        _loggers(config, context, first_step=done.step, trackers=trackers) as loggers,
        _saved_when_rollouts_fail(save_what_was_reached),
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
        source = RolloutSource(plan, context, engines, prompts, waiting=done.waiting)
        profiler = Profiler(config.profile, output_dir, rank=context.rank)
        stack.callback(profiler.close)
        for step in range(done.step, config.train_iters):
            profiler.begin(step)
            started = time.perf_counter()
            torch.cuda.reset_peak_memory_stats()
            of_step = source.of_step(step)
            rollouts = taught_by(of_step.rollouts, config.teachers, seed=config.seed)
            compared: dict[str, Any] = {}
            if compares_logprobs(step, config):
                compared = logprob_check.compare(rollouts, of_step.fixed, step=step)
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
                waiting=source.waiting,
            )
            metrics = {
                "step": step,
                **step_metrics(result, plan, step),
                **pass_metrics(
                    result, world_size=dist.get_world_size(), peak_tflops=_peak_tflops(context)
                ),
                **rollout_metrics(rollouts, step),
                **compared,
                "skipped_steps": skipped_steps,
                "unsupervised_steps": unsupervised_steps,
                **engine_metrics(of_step),
                **surplus_metrics(of_step.surplus),
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
                    engines.take_work()  # which is none of the next step's
                    engines.sleep()
                    if alarm is not None:
                        metrics["collapse_alarm"] = alarm.raise_for(metrics)
            finally:  # the step is done, whatever becomes of its evaluation
                metrics["rollout_engine_restarts"] = engines.take_restarts()
                if loggers is not None:
                    loggers.log(metrics)
                    if config.samples_interval and step % config.samples_interval == 0:
                        loggers.log_samples(step, samples_of(rollouts, plan.tokenizer))
            # Before a checkpoint, which is none of a step's phases.
            profiler.end(step)
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


@contextlib.contextmanager
def _loggers(
    config: RunConfig, context: ParallelContext, *, first_step: int, trackers: Logger
) -> Iterator[Loggers | None]:
    """The run's loggers on rank 0, None on other ranks; closes all but ``trackers`` at the end."""
    if context.rank != 0:
        yield None
        return
    output_dir = Path(config.output_dir)
    own: list[Logger] = [JsonLogger(output_dir, first_step=first_step)]
    if config.tensorboard:
        own.append(TensorBoardLogger(output_dir, first_step=first_step))
    own.append(TerminalLogger(first_step=first_step, num_steps=config.train_iters))
    with contextlib.closing(Loggers(own)):
        yield Loggers([*own, trackers])


@contextlib.contextmanager
def _saved_when_rollouts_fail(save: Callable[[], str]) -> Iterator[None]:
    """Saves a checkpoint and extends the error when rollouts fail for good, on all ranks."""
    try:
        yield
    except RolloutEngineError as error:
        raise RolloutEngineError(f"{error}\n{save()}") from error
    except RolloutFunctionError as error:
        # A user's mistake is told in one line.
        raise RolloutFunctionError(f"{error}; {save()}") from error


def _peak_tflops(context: ParallelContext) -> float | None:
    """The peak of this rank's GPU; None on a CPU and for an unknown GPU."""
    if context.device.type == "cpu":
        return None
    return peak_tflops(torch.cuda.get_device_name(context.device))


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
            for name, shape in stored_shapes(plan.layout.student.table).items()
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
        if plan.config.export.push_to_hub:
            push_to_hub(out, plan.config.export)
    else:
        # The stream communicates, so every rank has to consume it.
        for _ in stream:
            pass
    return out
