"""Prompt files (JSONL, parquet) as token ids, and which prompts a training step takes."""

import difflib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from megatron_oprd.errors import UserError

logger = logging.getLogger(__name__)

_PARQUET_ROWS_AT_ONCE = 1024

Message = dict[str, str]
LongPrompts = Literal["drop", "cut"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
        index: Its position in the concatenated data set, dropped prompts counted.
        token_ids: Its token ids, the chat template applied; never empty.
        occurrence: How often the prompt came before in the same step, so that it gets other
            responses each time.
    """

    index: int
    token_ids: tuple[int, ...]
    occurrence: int = 0


def load_prompts(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_key: str = "prompt",
    chat_template: bool | None,
    max_prompt_tokens: int,
    long_prompts: LongPrompts = "drop",
) -> list[Prompt]:
    """Reads and tokenizes every prompt of ``files``, in order.

    A prompt is a text or a list of chat messages (``{"role": ..., "content": ...}``). Messages go
    through the tokenizer's chat template with its generation prompt; plain text gets whatever
    special tokens the tokenizer adds by itself.

    Args:
        files: ``.jsonl`` (one object a line) or ``.parquet`` files, read as one data set.
        tokenizer: The student's tokenizer.
        prompt_key: The field (column) that holds the prompt.
        chat_template: None: messages go through the template, text stays plain. True: text is
            one user message. False: no template; messages are refused.
        max_prompt_tokens: Longer prompts are dropped or cut; how many is logged.
        long_prompts: drop leaves them out; cut takes their last ``max_prompt_tokens`` tokens, so
            that the end of the question and the generation prompt stay.

    Returns:
        The prompts that were kept. `Prompt.index` still counts the dropped ones.

    Raises:
        UserError: A file is missing, empty or unreadable, a row lacks the prompt, the tokenizer
            has no chat template but needs one, or every prompt is too long.
    """
    prompts: list[Prompt] = []
    num_rows = num_cut = 0
    shortest_dropped: int | None = None
    for where, value in _all_rows(files, prompt_key):
        content = text_or_messages(where, value, prompt_key)
        token_ids = tokenize_prompt(where, content, tokenizer, chat_template)
        if len(token_ids) > max_prompt_tokens and long_prompts == "cut":
            token_ids = token_ids[-max_prompt_tokens:]
            num_cut += 1
        if len(token_ids) <= max_prompt_tokens:
            prompts.append(Prompt(index=num_rows, token_ids=token_ids))
        elif shortest_dropped is None or len(token_ids) < shortest_dropped:
            shortest_dropped = len(token_ids)
        num_rows += 1
    if not prompts:
        raise UserError(
            f"data.max_prompt_tokens is {max_prompt_tokens}, but each of the {num_rows} prompts is "
            f"longer, the shortest {shortest_dropped} tokens; give a larger number"
        )
    if len(prompts) < num_rows:
        logger.warning(
            "dropped %d of %d prompts: longer than data.max_prompt_tokens=%d",
            num_rows - len(prompts),
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
    chat_template: bool | None,
) -> None:
    """Tokenizes the first row of every file, as `load_prompts` would.

    Raises:
        UserError: A file is missing, empty or unreadable, its first row has no usable prompt, or
            the tokenizer has no chat template but needs one.
    """
    for file in _non_empty(files):
        where, value = next(_rows(file, prompt_key))
        tokenize_prompt(where, text_or_messages(where, value, prompt_key), tokenizer, chat_template)


def prompt_indices(
    step: int, *, num_prompts: int, prompts_per_step: int, seed: int, shuffle: bool = True
) -> list[int]:
    """The prompts of one training step, computed from the step's number alone.

    The stream of prompts is one permutation per epoch after the other; step t takes
    ``[t * prompts_per_step, (t + 1) * prompts_per_step)`` of it. A resumed run therefore needs
    nothing but its step number. A prompt can appear twice in a step only where the step spans an
    epoch's end.

    Args:
        step: The step, counted from 0.
        num_prompts: Length of the list that `load_prompts` returned.
        prompts_per_step: Prompts a step over all ranks.
        seed: At least 0; with the epoch it decides the permutation.
        shuffle: False takes the prompts in order.

    Returns:
        ``prompts_per_step`` positions in the list that `load_prompts` returned (these are not
        `Prompt.index` where prompts were dropped).
    """
    permutations: dict[int, Sequence[int]] = {}
    indices = []
    for position in range(step * prompts_per_step, (step + 1) * prompts_per_step):
        epoch, offset = divmod(position, num_prompts)
        if epoch not in permutations:
            permutations[epoch] = (
                np.random.default_rng([seed, epoch]).permutation(num_prompts).tolist()
                if shuffle
                else range(num_prompts)
            )
        indices.append(permutations[epoch][offset])
    return indices


def text_or_messages(
    where: str, value: Any, prompt_key: str, *, setting: str = "data.prompts"
) -> str | list[Message]:
    """Checks a prompt as it stands in a file.

    Args:
        where: The row, for messages.
        value: The prompt.
        prompt_key: The prompt's column, for messages.
        setting: What names the file, for messages.

    Raises:
        UserError: It is neither a text nor a list of chat messages, or is empty.
    """
    if isinstance(value, str) and value:
        return value
    if (
        isinstance(value, list)
        and value
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    ):
        return value
    raise UserError(
        f"{setting}: {prompt_key!r} of {where} is {str(value)[:80]!r}; it must be a text or a "
        "list of chat messages with the texts 'role' and 'content', not empty"
    )


def tokenize_prompt(
    where: str,
    content: str | list[Message],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: bool | None,
) -> tuple[int, ...]:
    """Token ids of a prompt, as `load_prompts` makes them; ``where`` names it in messages.

    Raises:
        UserError: The prompt has no tokens, or needs a chat template that refuses it or is not
            there.
    """
    if isinstance(content, str) and not chat_template:
        token_ids = tokenizer(content)["input_ids"]
    else:
        token_ids = _apply_chat_template(where, content, tokenizer, chat_template)
    if not token_ids:
        raise UserError(f"data.prompts: the prompt of {where} has no tokens; remove it")
    return tuple(token_ids)


def _non_empty(files: Sequence[Path]) -> Sequence[Path]:
    if not files:
        raise UserError("data.prompts is empty; give at least one .jsonl or .parquet file")
    return files


def _all_rows(files: Sequence[Path], prompt_key: str) -> Iterator[tuple[str, Any]]:
    for file in _non_empty(files):
        yield from _rows(file, prompt_key)


def _rows(file: Path, prompt_key: str) -> Iterator[tuple[str, Any]]:
    """Yields (a place to name in errors, the prompt as it stands in the file) at least once."""
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if file.suffix not in readers:
        raise UserError(f"data.prompts: {file} is not a prompt file; give .jsonl or .parquet files")
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"data.prompts: {file} {found}; give .jsonl or .parquet files")
    any_row = False
    try:
        for row in readers[file.suffix](file, prompt_key):
            any_row = True
            yield row
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"data.prompts: cannot read {file}: {error}") from error
    if not any_row:
        raise UserError(f"data.prompts: {file} has no rows; give a file with at least one prompt")


def _jsonl_rows(file: Path, prompt_key: str) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"data.prompts: {where} is not JSON ({error}); each line must be one object"
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"data.prompts: {where} is a JSON {type(row).__name__}; each line must be one "
                    f"object with the key {prompt_key!r}"
                )
            if prompt_key not in row:
                raise _missing_key(where, prompt_key, list(row))
            yield where, row[prompt_key]


def _parquet_rows(file: Path, prompt_key: str) -> Iterator[tuple[str, Any]]:
    with pq.ParquetFile(file) as table:
        columns = table.schema_arrow.names
        if prompt_key not in columns:
            raise _missing_key(str(file), prompt_key, columns)
        number = 0
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE, columns=[prompt_key]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield f"{file}, row {number}", value


def _missing_key(where: str, prompt_key: str, found: list[str]) -> UserError:
    nearest = difflib.get_close_matches(prompt_key, found, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return UserError(
        f"data.prompt_key is {prompt_key!r}, but {where} has only {', '.join(map(repr, found))}"
        f"{hint}"
    )


def _apply_chat_template(
    where: str,
    content: str | list[Message],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: bool | None,
) -> list[int]:
    if chat_template is False:
        raise UserError(
            f"data.chat_template is false, but {where} is a list of chat messages; set it to true "
            "or null, or give the prompts as text"
        )
    if tokenizer.chat_template is None:
        found = "data.chat_template is true" if chat_template else f"{where} is chat messages"
        raise UserError(
            f"{found}, but the student's tokenizer has no chat template; give the prompts as text "
            "with data.chat_template null or false, or a tokenizer with a chat template"
        )
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except jinja2.TemplateError as error:
        raise UserError(
            f"data.prompts: the student's chat template refuses {where}: {error}"
        ) from error
