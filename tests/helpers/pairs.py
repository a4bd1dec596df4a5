"""Tiny student/teacher pairs, fixed rollouts and the configuration around them."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_oprd.config.load import load_config
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.data.teacher_sequences import TeacherSequence, with_other_prompt
from megatron_oprd.rollout.engine import Rollout
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_tokenizer

Tokens = list[list[int]]

# With Adam's usual epsilon a first update is the sign of the gradient: an element whose gradient is
# nothing but rounding moves by the whole learning rate, in a direction that the processor decides.
# With this one updates are linear in gradients.
LINEAR_UPDATES = ["optimizer.lr=0.1", "optimizer.adam_eps=1.0", "optimizer.lr_warmup_fraction=0"]


def save_pair(
    folder: Path,
    family: str,
    *,
    teacher_family: str | None = None,
    teacher_layers: int = 4,
    teacher_vocab_size: int | None = None,
    tied: bool = False,
    teacher_fields: dict[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """Saves student and teacher under ``folder``, with prompts and a run file.

    Both are of one family unless ``teacher_family`` is given; ``fields`` are of both models'
    configurations, ``teacher_fields`` of the teacher's only. A teacher with a larger vocabulary has
    the student's tokenizer nevertheless.
    """
    folder.mkdir(parents=True)
    fields = {"tie_word_embeddings": tied, **fields}
    save_tiny_model(folder / "student", tiny_config(family, **fields), seed=1)
    of_teacher = {"num_hidden_layers": teacher_layers}
    if teacher_vocab_size is not None:
        of_teacher["vocab_size"] = teacher_vocab_size
    save_tiny_model(
        folder / "teacher",
        tiny_config(teacher_family or family, **fields | of_teacher | (teacher_fields or {})),
        seed=2,
    )
    if teacher_vocab_size is not None:
        tiny_tokenizer().save_pretrained(folder / "teacher")
    (folder / "prompts.jsonl").write_text(
        "".join(f'{{"prompt": "{a} plus {b}"}}\n' for a in range(4) for b in range(4))
    )
    (folder / "run.yaml").write_text(
        f"""
output_dir: {folder / "run"}
tensorboard: false
model:
  student: {folder / "student"}
  teacher: {folder / "teacher"}
  params_dtype: fp32
data:
  prompts: [{folder / "prompts.jsonl"}]
  max_prompt_tokens: 64
rollout: {{prompts_per_step: 4, samples_per_prompt: 2, max_new_tokens: 12}}
optimizer: {{lr: 1.0e-4}}
"""
    )
    return folder


def config_of(pair: Path, overrides: list[str]) -> RunConfig:
    """The pair's configuration with overrides."""
    return load_config(pair / "run.yaml", overrides)


def fixed_rollouts(count: int = 8, vocab_size: int = 97) -> tuple[Tokens, Tokens]:
    """Prompts and responses of different lengths, always the same."""
    draw = random.Random(0)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(5, vocab_size) for _ in range(draw.randrange(low, high))]

    return [tokens(3, 9) for _ in range(count)], [tokens(1, 20) for _ in range(count)]


def fixed_written() -> list[list[bool]]:
    """Which tokens of the responses of `fixed_rollouts` the student wrote, always the same.

    Responses have gaps at the beginning, in the middle and at the end; of the longest two the
    student wrote the first or the last token alone.
    """
    draw = random.Random(2)
    _, responses = fixed_rollouts()
    written = []
    for response in responses:
        of_response = [draw.random() < 0.6 for _ in response]
        if not any(of_response):
            of_response[draw.randrange(len(response))] = True
        written.append(of_response)
    in_order = sorted(range(len(responses)), key=lambda number: len(responses[number]))
    for number, place in ((in_order[-1], 0), (in_order[-2], -1)):
        written[number] = [False] * len(responses[number])
        written[number][place] = True
    return written


def as_rollouts(
    prompts: Tokens,
    responses: Tokens,
    reading: Sequence[TeacherSequence] | None = None,
    taught_by: Sequence[Sequence[bool]] | None = None,
    written: Sequence[Sequence[bool]] | None = None,
) -> list[Rollout]:
    """Rollouts of given tokens.

    Args:
        prompts: Token ids of each prompt.
        responses: Token ids of each response.
        reading: What the teacher reads in place of each.
        taught_by: For each teacher, whether it teaches each rollout.
        written: Of each response token, whether the student wrote it.
    """
    return [
        Rollout(
            prompt_index=number,
            sample_index=0,
            prompt_ids=tuple(prompt),
            response_ids=tuple(response),
            finished=True,
            teacher=None if reading is None else reading[number],
            taught_by=None if taught_by is None else tuple(one[number] for one in taught_by),
            written=None if written is None else tuple(written[number]),
        )
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


def fixed_teacher_sequences(kind: str) -> list[TeacherSequence]:
    """What a teacher reads in place of `fixed_rollouts`, always the same.

    Args:
        kind: other_prompt: the responses behind longer prompts. other_tokens: responses of other
            tokens and lengths, some of which correspond to the student's; of the last sequence none
            do.
    """
    draw = random.Random(1)
    prompts, responses = fixed_rollouts()
    sequences = []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        longer = [*prompt, *(draw.randrange(5, 97) for _ in range(draw.randrange(1, 9)))]
        if kind == "other_prompt":
            sequences.append(with_other_prompt(longer, response))
            continue
        others = [draw.randrange(5, 97) for _ in range(draw.randrange(1, 25))]
        count = 0 if number == 7 else draw.randrange(1, min(len(others), len(response)) + 1)
        ours, theirs = (sorted(draw.sample(range(len(one)), count)) for one in (response, others))
        sequences.append(
            TeacherSequence(
                prompt_ids=tuple(longer),
                response_ids=tuple(others),
                pairs=tuple(zip(ours, theirs, strict=True)),
            )
        )
    return sequences
