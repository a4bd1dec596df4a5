"""Tokenizers and prompt formats of a run's models, checked before anything is built."""

import logging
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.data.chat import ChatFormat, asks_the_clock, thinking, turn_end
from megatron_oprd.data.prompts import TeacherPrompts, check_prompt_files
from megatron_oprd.data.teacher_sequences import TeacherReader
from megatron_oprd.data.tokenizers import (
    check_same_tokenizer,
    eos_token_ids,
    load_tokenizer,
    pad_token_id,
)
from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.training.layout import RunLayout

logger = logging.getLogger(__name__)


def student_tokenizer(layout: RunLayout, folder: Path) -> PreTrainedTokenizerBase:
    """Loads the student's tokenizer; raises a UserError if it cannot be used."""
    tokenizer = load_tokenizer(folder)
    eos_token_ids(folder, tokenizer)
    pad_token_id(tokenizer)
    _check_vocabulary("model.student", tokenizer, layout.student.architecture)
    return tokenizer


def teacher_reader(
    layout: RunLayout,
    tokenizer: PreTrainedTokenizerBase,
    *,
    student_folder: Path,
    teacher_folder: Path,
) -> TeacherReader | None:
    """How a teacher reads rollouts; None if it reads the student's sequences.

    ``layout`` is the run with this teacher alone. The folders hold the models' tokenizers.

    Raises:
        UserError: The teacher's tokenizer cannot be used.
    """
    config = layout.config
    settings = config.teacher_prompt
    own_tokens = settings.tokenizer == "own"
    if not own_tokens:
        check_same_tokenizer(
            student_folder,
            teacher_folder,
            otherwise="; with teacher_prompt.tokenizer = own the teacher reads the text in its own",
        )
    of_teacher = load_tokenizer(teacher_folder)
    if own_tokens:
        _check_fast(tokenizer, of_teacher)
    _warn_of_turns(
        config,
        student_folder=student_folder,
        teacher_folder=teacher_folder,
        tokenizer=tokenizer,
        of_teacher=of_teacher,
    )
    reads = of_teacher if own_tokens else tokenizer
    _check_vocabulary("model.teacher", reads, layout.teacher.architecture)
    if not settings.is_own:
        return None
    ends = (*eos_token_ids(student_folder, tokenizer), *config.rollout.stop_token_ids)
    return TeacherReader(
        prompts=TeacherPrompts(
            tokenizer=reads,
            privileged_key=settings.privileged_key,
            template=settings.template,
            max_tokens=layout.teacher_max_prompt_tokens,
            chat=chat_format_of_teacher(config),
        ),
        own_tokens=own_tokens,
        student_tokenizer=tokenizer,
        student_ends=ends,
        max_tokens=layout.teacher_max_sequence_length,
    )


def check_prompts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, reader: TeacherReader | None
) -> None:
    """Checks the beginning of each prompt file as both models read it; see `check_prompt_files`."""
    check_prompt_files(
        [Path(file) for file in config.data.prompts],
        tokenizer,
        prompt_key=config.data.prompt_key,
        chat=chat_format(config),
        teacher=None if reader is None else reader.prompts,
        columns=columns_with_settings(config),
    )


def columns_with_settings(config: RunConfig) -> list[tuple[str, str]]:
    """The prompts' columns that the run needs, each with a setting that names it."""
    named = dict.fromkeys(config.prompt_columns, "a teacher's `when`")
    named |= dict.fromkeys(config.rollout.function_columns, "rollout.function_columns")
    if config.data.group_by is not None:
        named[config.data.group_by] = "data.group_by"
    return list(named.items())


def chat_format(config: RunConfig) -> ChatFormat:
    """How the student's prompts are rendered."""
    data = config.data
    return ChatFormat(
        template=data.chat_template,
        kwargs=data.chat_template_kwargs,
        continue_final_message=data.continue_final_message,
    )


def chat_format_of_benchmarks(config: RunConfig) -> ChatFormat:
    """How benchmark problems are rendered: as in `megatron_oprd.evaluate`."""
    return ChatFormat(kwargs=config.data.chat_template_kwargs)


def chat_format_of_teacher(config: RunConfig) -> ChatFormat:
    """How a teacher's own prompts are rendered, if it has them."""
    own = config.teacher_prompt
    chat = replace(chat_format(config), suffix=own.suffix)
    if own.chat_template_kwargs is not None:
        chat = replace(chat, kwargs=own.chat_template_kwargs)
    return chat


def _check_fast(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    for model, tokenizer in (("student", student), ("teacher", teacher)):
        if not tokenizer.is_fast:
            raise UserError(
                f"model.{model}'s tokenizer is not a fast tokenizer, which "
                "teacher_prompt.tokenizer = own needs for character offsets; convert it to a "
                "tokenizer.json"
            )


def _warn_of_turns(
    config: RunConfig,
    *,
    student_folder: Path,
    teacher_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    of_teacher: PreTrainedTokenizerBase,
) -> None:
    """Warns if the teacher's turns begin or end in an unexpected way."""
    chat = chat_format_of_teacher(config)
    found = thinking(tokenizer, chat_format(config))
    # The generation prompt that the teacher was trained on; `read` is the one it gets in this run.
    expected = thinking(of_teacher, replace(chat, suffix=""))
    reads_own = config.teacher_prompt.tokenizer == "own"
    for model, one in (("student", tokenizer), *([("teacher", of_teacher)] if reads_own else [])):
        if asks_the_clock(one):
            logger.warning(
                "the chat template of model.%s prints the date in a format that cannot be "
                "recorded, so a resume on another day will be refused",
                model,
            )
    read = thinking(of_teacher if reads_own else tokenizer, chat)
    # A suffix is deliberate.
    if None not in (found, expected) and read != expected and not chat.suffix:
        logger.warning(
            "the generation prompt of model.teacher (%s) ends with %r, what it reads here with %r: "
            "data.chat_template_kwargs, teacher_prompt.chat_template_kwargs and "
            "teacher_prompt.suffix say what stands there",
            teacher_folder,
            expected,
            read,
        )
    elif None not in (found, read) and found != read:
        logger.warning(
            "the generation prompt of model.student (%s) ends with %r, that of model.teacher with "
            "%r: one of the two thinks before it answers; see data.chat_template_kwargs and "
            "teacher_prompt.suffix",
            student_folder,
            found,
            read,
        )
    if (
        config.teacher_prompt.tokenizer == "own"
        and of_teacher.chat_template is not None
        and turn_end(of_teacher, chat) is None
    ):
        logger.warning(
            "the chat template of model.teacher (%s) does not show which token ends its turn, so "
            "the ends of the student's turns are not supervised",
            teacher_folder,
        )


def _check_vocabulary(
    setting: str, tokenizer: PreTrainedTokenizerBase, architecture: Architecture
) -> None:
    # Not the vocabulary's size: ids may have gaps.
    highest = max(tokenizer.get_vocab().values())
    if highest >= architecture.vocab_size:
        raise UserError(
            f"{setting} has an embedding of {architecture.vocab_size} rows, but the tokenizer has "
            f"ids up to {highest}; it needs at least {highest + 1} rows"
        )
