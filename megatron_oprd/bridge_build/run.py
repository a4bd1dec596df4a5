"""Builds a bridge: rollouts, then the fit of every pair, then cosines on held-out sequences."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.bridge_build.config import BuildBridgeConfig
from megatron_oprd.bridge_build.fit import (
    FittedPair,
    MomentSums,
    fit_gradient,
    fit_least_squares,
    random_student,
)
from megatron_oprd.bridge_build.models import FrozenModels
from megatron_oprd.bridge_build.report import cosine_picture
from megatron_oprd.bridge_build.sequences import (
    Sequences,
    number_rows,
    split_prompts,
)
from megatron_oprd.distill.bridge_file import (
    PICTURE_FILE,
    Manifest,
    architecture_numbers,
    write_bridge,
)
from megatron_oprd.distill.projectors import Projectors, project_student, project_teacher
from megatron_oprd.distill.representation import token_cosine
from megatron_oprd.errors import UserError, speaks
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.collect import collect
from megatron_oprd.rollout.engine import Rollout
from megatron_oprd.training.layout import ModelLayout
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.training.prompts import load_run_prompts, sent_prompts_of_step
from megatron_oprd.training.rollouts import open_engines, sampling_of_step
from megatron_oprd.weights.progress import Progress


def build_bridge(config: BuildBridgeConfig, plan: RunPlan, context: ParallelContext) -> Manifest:
    """Builds the bridge of a plan and writes its folder; every rank has to call.

    Returns:
        The folder's manifest, on every rank.

    Raises:
        UserError: There are too few prompts or rows, or the folder cannot be written.
    """
    rollouts = _roll_out(config, plan, context)
    # By prompt: responses to the same prompt are never on both sides.
    held_out = split_prompts(
        [one.prompt_index for one in rollouts], share=config.fit.held_out_share, seed=config.seed
    )
    seen = number_rows(
        [one for one in rollouts if one.prompt_index not in held_out],
        config.taps,
        max_rows=config.fit.rows,
        seed=config.seed,
    )
    unseen = number_rows(
        [one for one in rollouts if one.prompt_index in held_out],
        config.taps,
        max_rows=None,
        seed=config.seed,
    )
    rank = max(config.fit.ranks)
    # The covariance of n rows has at most rank n - 1.
    if seen.num_rows <= rank:
        raise UserError(
            f"fit.ranks has {rank}, but the responses give only {seen.num_rows} rows to fit on; "
            "give more prompts (fit.num_prompts), longer responses (rollout.max_new_tokens), more "
            "positions (taps.positions) or a lower rank"
        )
    models = FrozenModels(plan, context)
    fits = _fit(config, plan, models, seen, context)
    cosine = _cosines(config, plan, models, unseen, fits, context)
    manifest = Manifest(
        student=_describe(config.model.student, plan.layout.student),
        teacher=_describe(config.model.teacher, plan.layout.teacher),
        layer_pairs=[(pair.student, pair.teacher) for pair in plan.layout.pairs],
        positions=config.taps.positions,
        k=config.taps.k,
        alignment=config.taps.alignment,
        last_layer=config.taps.last_layer,
        rank=rank,
        fit=dataclasses.asdict(config.fit),
        data={
            "seed": config.seed,
            "data": dataclasses.asdict(config.data),
            "rollout": dataclasses.asdict(config.rollout),
            "teacher_prompt": dataclasses.asdict(config.teacher_prompt),
            "sequences": len(seen.token_ids),
            "rows": seen.num_rows,
            "held_out_sequences": len(unseen.token_ids),
            "held_out_rows": unseen.num_rows,
        },
        cosine=cosine,
    )
    projectors = _gather(fits, plan, context)
    if context.rank == 0:
        assert projectors is not None
        write_bridge(
            Path(config.output_dir),
            projectors,
            manifest,
            files={PICTURE_FILE: cosine_picture(manifest)},
        )
    return manifest


def _roll_out(config: BuildBridgeConfig, plan: RunPlan, context: ParallelContext) -> list[Rollout]:
    """Stage 0: responses of the student as it is on disk, the same on every rank."""
    prompts = load_run_prompts(plan) if context.rank == 0 else []
    rollouts: list[Rollout] = []
    source = plan.student_checkpoint

    def stream(*, trainable_only: bool, wanted: bool) -> Iterator[tuple[str, Tensor | None]]:
        return ((name, source.read(name)) for name in (source.names() if wanted else ()))

    with ExitStack() as stack:
        engines = stack.enter_context(
            open_engines(
                plan,
                context,
                stream,
                # Next to the bridge's folder, which must contain a bridge or nothing.
                log_prefix=f"{Path(plan.config.output_dir)}.",
            )
        )
        engines.sync()
        progress = stack.enter_context(
            Progress("rollouts", config.num_steps, unit=" rounds", shown=speaks())
        )
        for step in range(config.num_steps):
            of_step = sent_prompts_of_step(step, prompts, plan.config, context)
            sampling = sampling_of_step(step, plan.config)
            rollouts += collect(
                engines,
                of_step,
                sampling,
                reader=plan.teachers[0].reader,
                function=plan.function,
            )
            engines.take_restarts()  # they are limited for each round
            progress.advance(1)
    return rollouts


def _fit(
    config: BuildBridgeConfig,
    plan: RunPlan,
    models: FrozenModels,
    seen: Sequences,
    context: ParallelContext,
) -> dict[int, FittedPair]:
    """Stage 1: the projectors of this rank's pairs, by pair number."""
    fit = config.fit
    own = _own_pairs(plan, context)
    rank = max(fit.ranks)
    if fit.method == "least_squares":
        layout = plan.layout
        widths = layout.student.architecture.hidden_size, layout.teacher.architecture.hidden_size
        sums = {number: MomentSums.zeros(*widths, context.device) for number in own}

        def add(number: int, _rows: Tensor, student: Tensor, teacher: Tensor) -> None:
            sums[number].add(student, teacher)

        models.run(seen, add, what="states to fit on")
        for number in own:
            _sum_over_parts(sums[number].tensors(), plan, context)
        return _of_each_pair(
            own, lambda number: fit_least_squares(sums[number], rank=rank, ridge=fit.ridge)
        )

    # Unlike the sums, AdamW needs all rows at the same time.
    rows: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(number: int, row_numbers: Tensor, student: Tensor, teacher: Tensor) -> None:
        # Also without any row in this part: every rank has to join the sum below.
        if number not in rows:
            rows[number] = (
                student.new_zeros(seen.num_rows, student.shape[1]),
                teacher.new_zeros(seen.num_rows, teacher.shape[1]),
            )
        for kept, found in zip(rows[number], (student, teacher), strict=True):
            # Rows of other ranks stay 0, so that a sum collects them.
            kept[row_numbers - 1] = found

    models.run(seen, keep, what="states to fit on")
    for number in own:
        _sum_over_parts(list(rows[number]), plan, context)
    return _of_each_pair(
        own,
        lambda number: fit_gradient(
            *rows[number],
            rank=rank,
            epochs=fit.epochs,
            lr=fit.lr,
            batch_rows=fit.batch_rows,
            seed=config.seed + number,
        ),
    )


def _of_each_pair(own: list[int], fit: Callable[[int], FittedPair]) -> dict[int, FittedPair]:
    """The fits of this rank's pairs by number, with the progress of rank 0's."""
    fits = {}
    with Progress("fitting", len(own), unit=" pairs", shown=speaks()) as progress:
        for number in own:
            fits[number] = fit(number)
            progress.advance(1)
    return fits


def _cosines(
    config: BuildBridgeConfig,
    plan: RunPlan,
    models: FrozenModels,
    unseen: Sequences,
    fits: dict[int, FittedPair],
    context: ParallelContext,
) -> dict[str, dict[str, list[float]]]:
    """Mean cosine of the projected states on the held-out sequences, before and after the fit."""
    ranks = sorted(set(config.fit.ranks))
    width = plan.layout.student.architecture.hidden_size
    # The same random P_S that fit_gradient starts from.
    before = {
        number: random_student(max(ranks), width, seed=config.seed + number).to(context.device)
        for number in fits
    }
    # [pairs, before and after, ranks]
    shape = len(plan.layout.pairs), 2, len(ranks)
    sums = torch.zeros(shape, dtype=torch.float64, device=context.device)

    def add(number: int, _rows: Tensor, student: Tensor, teacher: Tensor) -> None:
        fitted = fits[number]
        targets = project_teacher(teacher, fitted.teacher, fitted.mean)
        for i, weight in enumerate((before[number], fitted.student)):
            states = project_student(student, weight)
            for j, rank in enumerate(ranks):
                cosine = token_cosine(states[:, :rank], targets[:, :rank])
                sums[number, i, j] += cosine.sum(dtype=torch.float64)

    models.run(unseen, add, what="held-out states")
    _sum_over_parts([sums], plan, context)
    # Each pair is on one stage and 0 on the others.
    dist.all_reduce(sums, group=context.groups.pp)
    means = (sums / unseen.num_rows).tolist()
    return {
        str(rank): {
            "before": [of_pair[0][j] for of_pair in means],
            "after": [of_pair[1][j] for of_pair in means],
        }
        for j, rank in enumerate(ranks)
    }


def _own_pairs(plan: RunPlan, context: ParallelContext) -> list[int]:
    own = plan.layout.pairs_of_rank(context.pp_rank)
    return [number for number, pair in enumerate(plan.layout.pairs) if pair in own]


def _sum_over_parts(tensors: list[Tensor], plan: RunPlan, context: ParallelContext) -> None:
    """Sums in place over the ranks that have parts of the same layers' rows."""
    for tensor in tensors:
        dist.all_reduce(tensor, group=context.groups.dp_cp)
        # Otherwise the tensor-parallel ranks have the same rows.
        if plan.config.parallel.sequence_parallel:
            dist.all_reduce(tensor, group=context.groups.tp)


def _gather(
    fits: dict[int, FittedPair], plan: RunPlan, context: ParallelContext
) -> Projectors | None:
    """All pairs' projectors on rank 0."""
    own = {
        number: dataclasses.replace(
            one, student=one.student.cpu(), teacher=one.teacher.cpu(), mean=one.mean.cpu()
        )
        for number, one in fits.items()
        # All ranks of a stage have the same fits after the sums; a single one sends them.
        if context.tp_rank == context.cp_rank == context.dp_rank == 0
    }
    gathered: list[Any] | None = None
    if context.rank == 0:
        gathered = [None] * context.control.size()
    dist.gather_object(own, gathered, dst=0, group=context.control)
    if gathered is None:
        return None
    of_pair = {plan.layout.pairs[n]: one for of_rank in gathered for n, one in of_rank.items()}
    return Projectors(
        student={pair.student: one.student for pair, one in of_pair.items()},
        teacher={pair.teacher: one.teacher for pair, one in of_pair.items()},
        mean={pair.teacher: one.mean for pair, one in of_pair.items()},
    )


def _describe(name: str, model: ModelLayout) -> dict[str, Any]:
    return {"name": name, "architecture": architecture_numbers(model.architecture)}
