"""Benchmark files: problems with their correct answers."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd.data.chat import ChatFormat, Message, text_or_messages, tokenize_prompt
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.data.rows import read_rows
from megatron_oprd.errors import UserError

logger = logging.getLogger(__name__)

_PROMPT, _ANSWER = "prompt", "reward_model.ground_truth"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem."""

    index: int  # row in the file, from 0
    content: str | list[Message]  # the prompt: text or chat messages
    answer: str  # as in the file


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The distinct problems of one file, in the file's order."""

    name: str  # the file's name without its extension
    problems: list[Problem]
    num_rows: int
    # Omitted rows: with the prompt of an earlier row, or with contradicting answers to a prompt.
    num_repeated: int
    num_contradicting: int

    def fingerprint(self) -> str:
        """SHA-256 of the problems and their answers."""
        text = json.dumps([[p.index, p.content, p.answer] for p in self.problems])
        return hashlib.sha256(text.encode()).hexdigest()

    def describe(self) -> str:
        """A line that says how many problems were read and omitted."""
        left_out = [
            f"{count} {why} left out"
            for count, why in (
                (self.num_repeated, "repeated rows"),
                (self.num_contradicting, "rows with contradicting answers"),
            )
            if count
        ]
        return ", ".join([f"{self.name}: {len(self.problems)} problems", *left_out])


def load_benchmarks(
    files: Sequence[Path],
    *,
    limit: int | None = None,
    instruction: str | None = None,
    setting: str = "--data",
) -> list[Benchmark]:
    """Reads benchmark files.

    Repeated prompts count once. If the rows of a prompt have different answers, the correct one is
    unknown, and all of them are omitted.

    Args:
        files: ``.parquet`` or ``.jsonl`` with the columns ``prompt`` (chat messages or text) and
            ``reward_model``, with the correct answer as ``ground_truth``.
        limit: Takes the first ``limit`` problems of each file; None takes all.
        instruction: Text that is appended to each problem (its last message) after a blank line.
        setting: The option that names the files, for messages.

    Raises:
        UserError: A file is missing, unreadable or empty, lacks a column, has an unusable row, or
            two files have the same name.
    """
    if not files:
        raise UserError(f"{setting} names no file; give .parquet or .jsonl files")
    benchmarks: dict[str, Benchmark] = {}
    for file in files:
        if file.stem in benchmarks:
            raise UserError(
                f"{setting} has two files called {file.stem!r}, but results go by name; rename one"
            )
        benchmarks[file.stem] = _load(file, limit, instruction, setting)
        logger.info("%s", benchmarks[file.stem].describe())
    return list(benchmarks.values())


def tokenized(
    benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat
) -> list[Prompt]:
    """The problems' prompts as token ids; `Prompt.index` is `Problem.index`."""
    return [
        Prompt(
            index=problem.index,
            token_ids=tokenize_prompt(
                f"{benchmark.name}, row {problem.index + 1}",
                problem.content,
                tokenizer,
                chat,
            ),
        )
        for problem in benchmark.problems
    ]


def check_length(
    name: str,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    max_tokens: int,
    *,
    setting: str = "--max-new-tokens",
) -> None:
    """Raises a UserError if the longest prompt and its response exceed ``max_tokens``."""
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    length = len(longest.token_ids)
    if length + max_new_tokens > max_tokens:
        raise UserError(
            f"{setting} = {max_new_tokens} is too much: with the longest prompt of {name} (row "
            f"{longest.index + 1}, {length} tokens) it exceeds the {max_tokens} tokens that the "
            f"model was made for; give at most {max(max_tokens - length, 0)}"
        )


def _load(file: Path, limit: int | None, instruction: str | None, setting: str) -> Benchmark:
    rows = read_rows(
        file,
        [_PROMPT, _ANSWER],
        setting=setting,
        key_settings=[f"{setting}: a benchmark's prompt", f"{setting}: the right answer"],
    )
    by_prompt: dict[str, list[Problem]] = {}
    num_rows = 0
    for index, (where, (prompt, answer)) in enumerate(rows):
        num_rows = index + 1
        content = text_or_messages(where, prompt, _PROMPT, setting=setting)
        if isinstance(answer, int | float):
            answer = str(answer)
        if not isinstance(answer, str) or not answer.strip():
            raise UserError(
                f"{setting}: {_ANSWER} of {where} is {answer!r}; it must be the right "
                "answer, a text"
            )
        problem = Problem(
            index=index, content=_with_instruction(content, instruction), answer=answer
        )
        by_prompt.setdefault(json.dumps(content), []).append(problem)
    agreeing = [same for same in by_prompt.values() if len({p.answer for p in same}) == 1]
    num_agreeing_rows = sum(map(len, agreeing))
    if not agreeing:
        raise UserError(
            f"{setting}: every row of {file} has an answer that another row contradicts; give a "
            "file in which a question has one answer"
        )
    return Benchmark(
        name=file.stem,
        problems=[same[0] for same in agreeing][:limit],
        num_rows=num_rows,
        num_repeated=num_agreeing_rows - len(agreeing),
        num_contradicting=num_rows - num_agreeing_rows,
    )


def _with_instruction(content: str | list[Message], instruction: str | None) -> str | list[Message]:
    if instruction is None:
        return content
    if isinstance(content, str):
        return f"{content}\n\n{instruction}"
    *earlier, last = content
    return [*earlier, {**last, "content": f"{last['content']}\n\n{instruction}"}]
