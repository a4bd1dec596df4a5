"""How a run's teacher reads rollouts, where it does not read the student's sequences."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_oprd.data.prompts import Prompt, TeacherPrompts
from megatron_oprd.data.teacher_sequences import (
    TeacherSequence,
    in_other_tokens,
    with_other_prompt,
)


@dataclass(frozen=True, kw_only=True)
class TeacherReader:
    """Makes what the teacher reads of a rollout.

    Attributes:
        prompts: How its prompts are made.
        own_tokens: Whether it reads responses in its own tokens; otherwise in the student's.
        student_tokenizer: The student's tokenizer, a fast one.
        student_ends: Tokens that end a response of the student.
        max_tokens: Most tokens that it reads.
    """

    prompts: TeacherPrompts
    own_tokens: bool
    student_tokenizer: PreTrainedTokenizerBase
    student_ends: tuple[int, ...]
    max_tokens: int

    def read(self, prompt: Prompt, response_ids: Sequence[int]) -> TeacherSequence:
        """What it reads in place of ``prompt`` (one of `load_prompts` with these) and response."""
        assert prompt.teacher_ids is not None, "loaded without the teacher's prompts"
        if not self.own_tokens:
            return with_other_prompt(prompt.teacher_ids, response_ids)
        tokenizer = self.prompts.tokenizer
        return in_other_tokens(
            response_ids,
            prompt.teacher_ids,
            student=self.student_tokenizer,
            teacher=tokenizer,
            student_ends=self.student_ends,
            teacher_end=prompt.teacher_end,
            max_tokens=self.max_tokens,
        )
