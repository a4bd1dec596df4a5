"""Measures several students, or one before and after training, against their teacher."""

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

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

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StudentResult:
    """One student's measures.

    Attributes:
        name: What tables and pictures call it.
        folder: The Hugging Face model folder.
        num_layers: Its number of layers.
        layer_map: For each of its layers, the teacher layer it was compared with, from 0. Empty
            where the student is not as wide as the teacher: no layers were compared.
        measures: The measures.
    """

    name: str
    folder: str
    num_layers: int
    layer_map: list[int]
    measures: TeacherForcedMeasures


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What ``megatron_oprd.evaluate`` writes to its JSON file.

    Attributes:
        teacher: The teacher's folder.
        prompts: The prompt files.
        num_prompts: Prompts that were continued.
        max_new_tokens: The longest continuation allowed, in tokens.
        students: The results, in the order in which the students were given (before, after).
    """

    teacher: str
    prompts: list[str]
    num_prompts: int
    max_new_tokens: int
    students: list[StudentResult]


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
    """Lets the teacher continue the prompts and compares each student with it on that.

    All layers of a student that is as wide as the teacher are compared, under the proportional
    map; of any student the distributions of the next token. One student is in memory at a time,
    beside the teacher.

    Args:
        teacher_folder: The teacher's Hugging Face model folder; its tokenizer reads the prompts.
        students: Name -> Hugging Face model folder, in the order of the result.
        prompt_files: Read by `load_prompts`.
        max_new_tokens: The longest continuation, in tokens.
        max_prompt_tokens: Longer prompts are left out.
        chat: How prompts are rendered.
        batch_size: Sequences a forward pass.
        dtype: What both models compute in.
        device: Where both models are.

    Raises:
        UserError: A folder or a prompt file is not usable, or a student's tokenizer or vocabulary
            size is not the teacher's.
    """
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
    """Writes an evaluation as JSON; the folder is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dataclasses.asdict(evaluation), indent=2) + "\n", encoding="utf-8")


def read_evaluation(file: Path) -> Evaluation:
    """Reads what `write_evaluation` wrote.

    Raises:
        UserError: The file is missing or is something else.
    """
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
    """Raises a UserError where two folders cannot be compared, before any weight is read."""
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
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).eval()
