"""Compares students, or a student before and after training, with their teacher."""

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_oprd.data.chat import ChatFormat
from megatron_oprd.data.prompts import load_prompts
from megatron_oprd.data.tokenizers import check_same_tokenizer, eos_token_ids, load_tokenizer
from megatron_oprd.distill.layer_map import layer_pairs
from megatron_oprd.errors import UserError
from megatron_oprd.evaluation.teacher_forced import (
    TeacherForcedMeasures,
    teacher_continuations,
    teacher_forced_measures,
)
from megatron_oprd.rollout.hf import attention_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StudentResult:
    """Result of one student."""

    name: str  # label in tables and figures
    folder: str  # Hugging Face model folder
    num_layers: int
    layer_map: list[int]  # student layer -> teacher layer, from 0; empty if hidden sizes differ
    measures: TeacherForcedMeasures


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of ``megatron_oprd.evaluate``, as written to its JSON file."""

    teacher: str  # the teacher's folder
    prompts: list[str]  # prompt files
    num_prompts: int  # continued prompts
    max_new_tokens: int  # limit of continuations, in tokens
    students: list[StudentResult]  # in the given order (before, after)


def evaluate_students(
    teacher_folder: Path,
    students: dict[str, Path],
    prompt_files: Sequence[Path],
    *,
    max_new_tokens: int,
    max_prompt_tokens: int,
    chat: ChatFormat,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Evaluation:
    """Lets the teacher continue the prompts and compares each student with it on the continuations.

    Next-token distributions are compared for every student; hidden states of all layers, under the
    proportional map, if the student has the teacher's hidden size. One student at a time is in
    memory, next to the teacher.

    Args:
        teacher_folder: The teacher's Hugging Face model folder, whose tokenizer is used.
        students: Name -> Hugging Face model folder, in the order of the result.
        prompt_files: Files for `load_prompts`.
        max_new_tokens: Limit of continuations, in tokens.
        max_prompt_tokens: Longer prompts are omitted.
        chat: How prompts are rendered.
        batch_size: Sequences per forward pass.
        dtype: Type in which both models compute.
        device: Device of both models.

    Raises:
        UserError: A folder or prompt file is unusable, or a student's tokenizer or vocabulary size
            differs from the teacher's.
    """
    # Before any weights are read: an unusable folder fails at once.
    for folder in students.values():
        _check_comparable(folder, teacher_folder)
    tokenizer = load_tokenizer(teacher_folder)
    prompts = load_prompts(prompt_files, tokenizer, chat=chat, max_prompt_tokens=max_prompt_tokens)
    teacher = _load_model(teacher_folder, dtype, device)
    begin = time.perf_counter()
    continuations = teacher_continuations(
        teacher,
        [prompt.token_ids for prompt in prompts],
        eos_token_ids=eos_token_ids(teacher_folder, tokenizer),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    logger.info(
        "the teacher continued %d prompts in %.1f s", len(prompts), time.perf_counter() - begin
    )

    results = []
    for name, folder in students.items():
        begin = time.perf_counter()
        student = _load_model(folder, dtype, device)
        num_layers = student.config.num_hidden_layers
        pairs = []
        if student.config.hidden_size == teacher.config.hidden_size:
            pairs = layer_pairs(
                "all",
                "proportional",
                num_student_layers=num_layers,
                num_teacher_layers=teacher.config.num_hidden_layers,
            )
        else:
            logger.info(
                "%s is %d wide, the teacher %d: no cosine of their hidden states",
                name,
                student.config.hidden_size,
                teacher.config.hidden_size,
            )
        measures = teacher_forced_measures(
            student, teacher, continuations, pairs, batch_size=batch_size
        )
        results.append(
            StudentResult(
                name=name,
                folder=str(folder),
                num_layers=num_layers,
                layer_map=[pair.teacher for pair in pairs],
                measures=measures,
            )
        )
        logger.info("measured %s in %.1f s", name, time.perf_counter() - begin)
    return Evaluation(
        teacher=str(teacher_folder),
        prompts=[str(file) for file in prompt_files],
        num_prompts=len(prompts),
        max_new_tokens=max_new_tokens,
        students=results,
    )


def write_evaluation(evaluation: Evaluation, file: Path) -> None:
    """Writes an evaluation as JSON; creates the folder if missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dataclasses.asdict(evaluation), indent=2) + "\n", encoding="utf-8")


def read_evaluation(file: Path) -> Evaluation:
    """Reads a file of `write_evaluation`; raises UserError if it is missing or invalid."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        students = [
            StudentResult(**{**student, "measures": TeacherForcedMeasures(**student["measures"])})
            for student in fields["students"]
        ]
        if not students:
            raise ValueError("it has no students")
        return Evaluation(**{**fields, "students": students})
    except OSError as error:
        raise UserError(f"--evaluation: cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--evaluation: {file} is not a file that megatron_oprd.evaluate wrote: {error}"
        ) from error


def _check_comparable(student_folder: Path, teacher_folder: Path) -> None:
    """Raises UserError if student and teacher cannot be compared; reads no weights."""
    student, teacher = _config(student_folder), _config(teacher_folder)
    check_same_tokenizer(student_folder, teacher_folder)
    if student.get("vocab_size") != teacher.get("vocab_size"):
        raise UserError(
            f"--student {student_folder} has vocab_size {student.get('vocab_size')}, --teacher "
            f"{teacher_folder} has {teacher.get('vocab_size')}; they must be equal to be compared"
        )


def _config(folder: Path) -> dict[str, object]:
    file = folder / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror}; give a Hugging Face model folder"
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error


def _load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention_of(config), local_files_only=True
    )
    return model.to(device).eval()
