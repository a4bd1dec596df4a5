"""Prompt files (JSONL, parquet) as token ids, and the prompts of each training step."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_oprd.data.chat import (
    ChatFormat,
    Message,
    text_or_messages,
    tokenize_prompt,
    turn_end,
)
from megatron_oprd.data.rows import read_rows
from megatron_oprd.errors import UserError

logger = logging.getLogger(__name__)

LongPrompts = Literal["drop", "cut"]
# Columns that other tools pass to the model; they are not read here.
_NOT_READ = ("tools", "images", "videos", "audios")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt."""

    index: int  # in the concatenated data set, dropped prompts counted
    token_ids: tuple[int, ...]  # chat template applied; never empty
    teacher_ids: tuple[int, ...] | None = None  # the teacher's prompt, if it differs
    # The token that ends the teacher's answer to it: its turn's end, or the end of the document
    # after plain text; None if unknown.
    teacher_end: int | None = None
    # (column, value) of the columns that the run asks for
    columns: tuple[tuple[str, Any], ...] = ()
    # Earlier occurrences in the same step, so that repeated prompts get other responses.
    occurrence: int = 0
    # Which of the step's ``samples_per_prompt`` responses an engine is asked for; None: all.
    samples: tuple[int, ...] | None = None
    # Which continuation of the same response this asks for (`megatron_oprd.rollout.function`), so
    # that each has noise of its own.
    turn: int = 0
    max_new_tokens: int | None = None  # at most, of each response to it; None: the step's
    # Of the noise, where prompts of several steps are generated together; None: the step's.
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherPrompts:
    """How the teacher's own prompts are made."""

    tokenizer: PreTrainedTokenizerBase
    # Column (or field in a column) with the text that only the teacher sees.
    privileged_key: str | None
    # Replaces a prompt, or the last user message in it: text with {prompt} and {privileged}.
    template: str
    max_tokens: int  # longer prompts are dropped
    chat: ChatFormat

    @cached_property
    def turn_end(self) -> int | None:
        """The token that ends the teacher's turn, see `megatron_oprd.data.chat.turn_end`."""
        return turn_end(self.tokenizer, self.chat)

    def end_behind(self, content: str | list[Message]) -> int | None:
        """The token that ends the teacher's answer to a prompt, see `Prompt`."""
        if self.chat.is_chat(content):
            return self.turn_end
        end = self.tokenizer.eos_token_id
        assert end is None or isinstance(end, int)
        return end

    def token_ids(
        self, where: str, content: str | list[Message], privileged: Any
    ) -> tuple[int, ...]:
        """A prompt's tokens as the teacher reads them; raises a UserError like `content`."""
        of_teacher = self.content(where, content, privileged)
        return tokenize_prompt(where, of_teacher, self.tokenizer, self.chat, whose="teacher")

    def content(
        self, where: str, content: str | list[Message], privileged: Any
    ) -> str | list[Message]:
        """A prompt as the teacher gets it; raises a UserError if the privileged text is missing."""
        if self.privileged_key is None:
            return content
        is_number = isinstance(privileged, int | float) and not isinstance(privileged, bool)
        if is_number and math.isfinite(privileged):
            privileged = str(privileged)
        if not isinstance(privileged, str) or not privileged.strip():
            raise UserError(
                f"teacher_prompt.privileged_key = {self.privileged_key}: {where} has "
                f"{privileged!r}; it must be a text or a number"
            )
        if isinstance(content, str):
            return self.template.format(prompt=content, privileged=privileged)
        # The last user message, which need not be the last: an answer may be begun after it.
        asked = [i for i, message in enumerate(content) if message["role"] == "user"]
        place = asked[-1] if asked else len(content) - 1
        question = content[place]
        text = self.template.format(prompt=question["content"], privileged=privileged)
        return [*content[:place], {**question, "content": text}, *content[place + 1 :]]


def load_prompts(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_key: str = "prompt",
    chat: ChatFormat,
    max_prompt_tokens: int,
    long_prompts: LongPrompts = "drop",
    teacher: TeacherPrompts | None = None,
    columns: Sequence[tuple[str, str]] = (),
) -> list[Prompt]:
    """Reads and tokenizes every prompt of ``files``, in order.

    A prompt is a text or a list of chat messages (``{"role": ..., "content": ...}``); see
    `tokenize_prompt`. `Prompt.index` counts dropped prompts too.

    Args:
        files: ``.jsonl`` (one object per line) or ``.parquet`` files, read as one data set.
        tokenizer: The student's tokenizer.
        prompt_key: The field (column) that holds the prompt.
        chat: How prompts are rendered.
        max_prompt_tokens: Longer prompts are dropped or cut; their number is logged.
        long_prompts: ``drop``, or ``cut`` to the last ``max_prompt_tokens`` tokens, which keeps the
            end of the question and the generation prompt.
        teacher: How the teacher's prompts are made; None: they are the student's.
        columns: Columns for `Prompt.columns`, each with the setting that names it.

    Raises:
        UserError: A file is missing, empty or unreadable, a row lacks the prompt or a column, the
            tokenizer has no chat template but needs one, or every prompt is too long.
    """
    prompts: list[Prompt] = []
    num_rows = num_cut = num_long_for_teacher = 0
    shortest_dropped: int | None = None
    for where, content, privileged, values in _all_rows(files, prompt_key, teacher, columns):
        index, num_rows = num_rows, num_rows + 1
        token_ids = tokenize_prompt(where, content, tokenizer, chat)
        if len(token_ids) > max_prompt_tokens and long_prompts == "cut":
            token_ids = token_ids[-max_prompt_tokens:]
            num_cut += 1
        if len(token_ids) > max_prompt_tokens:
            shortest_dropped = min(shortest_dropped or len(token_ids), len(token_ids))
            continue
        teacher_ids = teacher_end = None
        if teacher is not None:
            teacher_ids = teacher.token_ids(where, content, privileged)
            teacher_end = teacher.end_behind(content)
            if len(teacher_ids) > teacher.max_tokens:
                num_long_for_teacher += 1
                continue
        prompts.append(
            Prompt(
                index=index,
                token_ids=token_ids,
                teacher_ids=teacher_ids,
                teacher_end=teacher_end,
                columns=values,
            )
        )
    if num_long_for_teacher:
        assert teacher is not None
        if not prompts:
            raise UserError(
                f"teacher_prompt.max_tokens is {teacher.max_tokens}, but each of the "
                f"{num_long_for_teacher} prompts is longer for the teacher; give a larger number"
            )
        logger.warning(
            "dropped %d of %d prompts: longer for the teacher than teacher_prompt.max_tokens=%d",
            num_long_for_teacher,
            num_rows,
            teacher.max_tokens,
        )
    if not prompts:
        raise UserError(
            f"data.max_prompt_tokens is {max_prompt_tokens}, but each of the {num_rows} prompts is "
            f"longer, the shortest {shortest_dropped} tokens; give a larger number"
        )
    if num_dropped := num_rows - len(prompts) - num_long_for_teacher:
        logger.warning(
            "dropped %d of %d prompts: longer than data.max_prompt_tokens=%d",
            num_dropped,
            num_rows,
            max_prompt_tokens,
        )
    if num_cut:
        logger.warning(
            "cut %d of %d prompts to their last data.max_prompt_tokens=%d tokens",
            num_cut,
            num_rows,
            max_prompt_tokens,
        )
    return prompts


def check_prompt_files(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_key: str = "prompt",
    chat: ChatFormat,
    teacher: TeacherPrompts | None = None,
    columns: Sequence[tuple[str, str]] = (),
) -> None:
    """Tokenizes the first row of every file like `load_prompts`, and raises the same errors."""
    for file in files:
        where, content, privileged, _ = next(_all_rows([file], prompt_key, teacher, columns))
        tokenize_prompt(where, content, tokenizer, chat)
        if teacher is not None:
            teacher.token_ids(where, content, privileged)


def prompt_indices(
    step: int, *, num_prompts: int, prompts_per_step: int, seed: int, shuffle: bool = True
) -> list[int]:
    """The prompts of one training step, as positions in the list that `load_prompts` returned.

    The stream of prompts is one permutation per epoch after the other (the list's order without
    ``shuffle``); step t, from 0, takes ``[t * prompts_per_step, (t + 1) * prompts_per_step)`` of
    it. ``seed`` (at least 0) and the epoch determine the permutation. So a resumed run needs only
    its step number. A prompt can appear twice in a step only if the step spans the end of an epoch.
    The positions are not `Prompt.index` if prompts were dropped.
    """
    places = range(step * prompts_per_step, (step + 1) * prompts_per_step)
    return indices_at(places, num_prompts=num_prompts, seed=seed, shuffle=shuffle)


def indices_at(
    places: Iterable[int], *, num_prompts: int, seed: int, shuffle: bool = True
) -> list[int]:
    """The prompts at places of the stream of `prompt_indices`, which has the arguments."""
    permutations: dict[int, Sequence[int]] = {}
    indices = []
    for position in places:
        epoch, offset = divmod(position, num_prompts)
        if epoch not in permutations:
            permutations[epoch] = (
                np.random.default_rng([seed, epoch]).permutation(num_prompts).tolist()
                if shuffle
                else range(num_prompts)
            )
        indices.append(permutations[epoch][offset])
    return indices


def _all_rows(
    files: Sequence[Path],
    prompt_key: str,
    teacher: TeacherPrompts | None,
    columns: Sequence[tuple[str, str]],
) -> Iterator[tuple[str, str | list[Message], Any, tuple[tuple[str, Any], ...]]]:
    """Yields (the row for messages, the prompt, the text that only the teacher sees, columns)."""
    keys, key_settings = [prompt_key], ["data.prompt_key"]
    if teacher is not None and teacher.privileged_key is not None:
        keys.append(teacher.privileged_key)
        key_settings.append("teacher_prompt.privileged_key")
    first = len(keys)
    keys += [column for column, _ in columns]
    key_settings += [setting for _, setting in columns]
    for file in files:
        for where, (prompt, *others) in read_rows(
            file, keys, setting="data.prompts", key_settings=key_settings, not_read=_NOT_READ
        ):
            content = text_or_messages(where, prompt, prompt_key)
            values = tuple(zip(keys[first:], others[first - 1 :], strict=True))
            for column, value in values:
                if not isinstance(value, str | int | float):
                    raise UserError(
                        f"{where} has {value!r} in column {column!r}; it must be a text or number"
                    )
            yield where, content, others[0] if first > 1 else None, values
