"""A run's prompts, the prompts of each step, and the teachers of each prompt."""

import dataclasses
import datetime
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_oprd.config.schema import RunConfig, TeacherConfig
from megatron_oprd.data.grouping import grouped_indices
from megatron_oprd.data.prompts import Prompt, indices_at, load_prompts, prompt_indices
from megatron_oprd.errors import UserError
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.engine import Rollout
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.training.reading import chat_format, columns_with_settings

logger = logging.getLogger(__name__)


def load_run_prompts(plan: RunPlan, *, today: datetime.date | None = None) -> list[Prompt]:
    """Reads and tokenizes the run's prompts; raises the errors of `load_prompts`.

    ``today`` is the date for chat templates that print one.
    """
    data = plan.config.data
    teacher = None if plan.teachers[0].reader is None else plan.teachers[0].reader.prompts
    if teacher is not None:
        teacher = dataclasses.replace(teacher, chat=dataclasses.replace(teacher.chat, today=today))
    prompts = load_prompts(
        [Path(file) for file in data.prompts],
        plan.tokenizer,
        prompt_key=data.prompt_key,
        chat=dataclasses.replace(chat_format(plan.config), today=today),
        max_prompt_tokens=data.max_prompt_tokens,
        long_prompts=data.long_prompts,
        teacher=teacher,
        columns=columns_with_settings(plan.config),
    )
    _check_columns(plan.config, prompts)
    return prompts


def _check_columns(config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Refuses a teacher without a prompt, and says how many prompts have no teacher."""
    taught = [False] * len(prompts)
    for name, teacher in config.named_teachers:
        matches = [_matches(teacher.when, dict(prompt.columns)) for prompt in prompts]
        taught = [before or now for before, now in zip(taught, matches, strict=True)]
        if not any(matches):
            column = next(iter(teacher.when))
            values = sorted({str(dict(prompt.columns)[column]) for prompt in prompts})
            raise UserError(
                f"{name}.when = {teacher.when} fits none of the {len(prompts)} prompts; their "
                f"column {column} has "
                f"{', '.join(values[:10])}{', ...' if len(values) > 10 else ''}"
            )
    if not_taught := taught.count(False):
        logger.warning(
            "%d of %d prompts have no teacher, because no teacher's `when` fits their columns",
            not_taught,
            len(prompts),
        )


def describe_prompts(plan: RunPlan) -> str:
    """The number of prompts, and the first as the models read it, as text for ``--dry-run``.

    Reads every row, and raises the errors of `load_prompts`.
    """
    prompts = load_run_prompts(plan)
    first = prompts[0]
    lines = [
        "",
        f"# prompts: {len(prompts)}; the first one, special tokens included",
        f"student: {plan.tokenizer.decode(first.token_ids)!r}",
    ]
    if first.teacher_ids is not None:
        assert plan.teachers[0].reader is not None
        tokenizer = plan.teachers[0].reader.prompts.tokenizer
        lines.append(f"teacher: {tokenizer.decode(first.teacher_ids)!r}")
        if plan.teachers[0].reader.own_tokens:
            end = first.teacher_end
            shown = "not known" if end is None else repr(tokenizer.decode([end]))
            lines.append(f"the token that ends the teacher's answer: {shown}")
    return "\n".join(lines)


def prompts_of_step(step: int, prompts: list[Prompt], config: RunConfig) -> list[Prompt]:
    """The prompts of one step."""
    order: dict[str, Any] = {
        "prompts_per_step": config.rollout.prompts_per_step,
        "seed": config.seed,
        "shuffle": config.data.shuffle,
    }
    if (column := config.data.group_by) is None:
        indices = prompt_indices(step, num_prompts=len(prompts), **order)
    else:
        groups = [dict(prompt.columns)[column] for prompt in prompts]
        indices = grouped_indices(step, groups, **order)
    return _at(indices, prompts)


def _at(indices: Sequence[int], prompts: Sequence[Prompt]) -> list[Prompt]:
    return [
        dataclasses.replace(prompts[i], occurrence=indices[:position].count(i))
        for position, i in enumerate(indices)
    ]


def sent_prompts_of_step(
    step: int, prompts: list[Prompt], config: RunConfig, context: ParallelContext
) -> list[Prompt]:
    """The prompts of one step on every rank (``context.control``), from rank 0, which has them."""
    return _sent(prompts_of_step(step, prompts, config) if context.rank == 0 else [], context)


def sent_prompts_at(
    places: Sequence[int], prompts: Sequence[Prompt], config: RunConfig, context: ParallelContext
) -> list[Prompt]:
    """The prompts at places of the stream, sent as `sent_prompts_of_step` does."""
    found: list[Prompt] = []
    if context.rank == 0:
        indices = indices_at(
            places, num_prompts=len(prompts), seed=config.seed, shuffle=config.data.shuffle
        )
        found = _at(indices, prompts)
    return _sent(found, context)


def sent_first_prompts(
    prompts: Sequence[Prompt], config: RunConfig, context: ParallelContext
) -> list[Prompt]:
    """The data's first ``rollout.logprob_check_prompts`` prompts on every rank."""
    return _sent(list(prompts[: config.rollout.logprob_check_prompts]), context)


def _sent(prompts: list[Prompt], context: ParallelContext) -> list[Prompt]:
    sent = [prompts]
    dist.broadcast_object_list(sent, src=0, group=context.control)
    return sent[0]


def taught_by(
    rollouts: Sequence[Rollout], teachers: Sequence[TeacherConfig], *, seed: int
) -> list[Rollout]:
    """Sets ``Rollout.taught_by``: the teachers of each rollout.

    A teacher with ``when`` teaches the prompts whose columns have its values. Of the teachers with
    a ``prompt_share`` one teaches a prompt, by a hash of its index and ``seed``, the same in every
    step. A teacher with neither teaches all prompts.
    """
    shares = [teacher.prompt_share for teacher in teachers]
    if all(share is None and not one.when for share, one in zip(shares, teachers, strict=True)):
        return list(rollouts)
    bounds: list[tuple[float, float]] = []
    start = 0.0
    for share in shares:
        if share is None:
            bounds.append((0.0, 1.0))
            continue
        stop = start + share
        # The last share ends at 1, despite rounding errors in the sum.
        bounds.append((start, 1.0 if stop > 1 - 1e-9 else stop))
        start = stop
    result = []
    for rollout in rollouts:
        number = _number(rollout.prompt_index, seed)
        columns = dict(rollout.columns)
        teaches = tuple(
            start <= number < end and _matches(teacher.when, columns)
            for (start, end), teacher in zip(bounds, teachers, strict=True)
        )
        result.append(dataclasses.replace(rollout, taught_by=teaches))
    return result


def _matches(when: Mapping[str, Any], columns: Mapping[str, Any]) -> bool:
    return all(
        columns[column] in wanted if isinstance(wanted, list) else columns[column] == wanted
        for column, wanted in when.items()
    )


def _number(prompt_index: int, seed: int) -> float:
    """A number in [0, 1), the same on every machine."""
    # Not hash(), which differs between processes for strings.
    digest = hashlib.sha256(f"{seed}:{prompt_index}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
