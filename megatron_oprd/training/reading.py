"""What both models of a run read: tokenizers and prompts, checked before anything is built."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd.config import RunConfig
from megatron_oprd.data.prompts import TeacherPrompts, check_prompt_files
from megatron_oprd.data.teacher_reader import TeacherReader
from megatron_oprd.data.tokenizers import (
    check_same_tokenizer,
    eos_token_ids,
    load_tokenizer,
    pad_token_id,
)
from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.training.layout import RunLayout


def plan_reading(
    layout: RunLayout, *, student_folder: Path, teacher_folder: Path
) -> tuple[PreTrainedTokenizerBase, TeacherReader | None]:
    """The student's tokenizer, and how the teacher reads if it reads other sequences.

    Args:
        layout: The run.
        student_folder: Folder with the student's tokenizer.
        teacher_folder: Folder with the teacher's.

    Raises:
        UserError: A tokenizer or a prompt file cannot be used.
    """
    config = layout.config
    settings = config.teacher_prompt
    tokenizer = load_tokenizer(student_folder)
    ends = eos_token_ids(student_folder, tokenizer)
    pad_token_id(tokenizer)
    own_tokens = settings.tokenizer == "own"
    teacher_tokenizer = tokenizer
    if own_tokens:
        teacher_tokenizer = load_tokenizer(teacher_folder)
        _check_own_tokens(config, tokenizer, teacher_tokenizer)
    else:
        check_same_tokenizer(
            student_folder,
            teacher_folder,
            otherwise="; with teacher_prompt.tokenizer = own the teacher reads the text in its own",
        )
    reader = None
    if own_tokens or settings.privileged_key is not None:
        reader = TeacherReader(
            prompts=TeacherPrompts(
                tokenizer=teacher_tokenizer,
                privileged_key=settings.privileged_key,
                template=settings.template,
                max_tokens=layout.teacher_max_prompt_tokens,
            ),
            own_tokens=own_tokens,
            student_tokenizer=tokenizer,
            student_ends=ends,
            max_tokens=layout.teacher_max_sequence_length,
        )
    check_prompt_files(
        [Path(file) for file in config.data.prompts],
        tokenizer,
        prompt_key=config.data.prompt_key,
        chat_template=config.data.chat_template,
        teacher=None if reader is None else reader.prompts,
    )
    _check_vocabulary("model.student", tokenizer, layout.student.architecture)
    _check_vocabulary("model.teacher", teacher_tokenizer, layout.teacher.architecture)
    return tokenizer, reader


def _check_own_tokens(
    config: RunConfig, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    for model, tokenizer in (("student", student), ("teacher", teacher)):
        if not tokenizer.is_fast:
            raise UserError(
                f"teacher_prompt.tokenizer = own: the tokenizer of model.{model} is no fast one "
                "(of the tokenizers library), which knows where in a text its tokens end; convert "
                "it to a tokenizer.json"
            )
    if teacher.eos_token_id is None:
        raise UserError(
            "teacher_prompt.tokenizer = own: the tokenizer of model.teacher names no "
            "end-of-sequence token; set eos_token in its tokenizer_config.json"
        )
    if config.output_loss.kind != "none":
        raise UserError(
            f"output_loss.kind = {config.output_loss.kind} with teacher_prompt.tokenizer = own: "
            "distributions over different tokens cannot be compared; use none, or a teacher with "
            "the student's tokenizer"
        )


def _check_vocabulary(
    setting: str, tokenizer: PreTrainedTokenizerBase, architecture: Architecture
) -> None:
    highest = max(tokenizer.get_vocab().values())
    if highest >= architecture.vocab_size:
        raise UserError(
            f"{setting} has an embedding of {architecture.vocab_size} rows; the tokenizer has ids "
            f"up to {highest}, so it needs at least {highest + 1}"
        )
