"""What the teacher reads in place of the student's own tokens, and which positions correspond.

A teacher with privileged text in its prompt reads the student's response behind another prompt; a
teacher with another tokenizer reads the same text in other tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_oprd.config import Alignment
from megatron_oprd.data.alignment import Pair, decode_with_ends, encode_with_ends, pairs_of


@dataclass(frozen=True, kw_only=True)
class TeacherSequence:
    """One rollout as the teacher reads it.

    Attributes:
        prompt_ids: Token ids of its prompt; at least one.
        response_ids: Token ids of the response.
        pairs: (response token of the student, response token of the teacher) that correspond, both
            counted from 0 and rising; may be empty.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    pairs: tuple[Pair, ...]

    def positions(self, alignment: Alignment, *, response_length: int) -> list[int | None]:
        """Which of the teacher's positions each response token of the student is compared with.

        Args:
            alignment: ``token``: the one that holds a token which ends at the same character.
                ``predictor``: the one in front of a token that starts at the same character, the
                last of the prompt included.
            response_length: Tokens of the student's response.

        Returns:
            For each of them a position in the teacher's sequence, prompt included, or None.
        """
        positions: list[int | None] = [None] * response_length
        start, ahead = len(self.prompt_ids), 0 if alignment == "token" else 1
        for of_student, of_teacher in [*([(-1, -1)] if ahead else []), *self.pairs]:
            if of_student + ahead < response_length:
                positions[of_student + ahead] = start + of_teacher
        return positions


def with_other_prompt(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> TeacherSequence:
    """The student's response behind another prompt, token for token."""
    return TeacherSequence(
        prompt_ids=tuple(prompt_ids),
        response_ids=tuple(response_ids),
        pairs=tuple((number, number) for number in range(len(response_ids))),
    )


def in_other_tokens(
    response_ids: Sequence[int],
    prompt_ids: Sequence[int],
    *,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_ends: Sequence[int],
    teacher_end: int | None,
    max_tokens: int,
) -> TeacherSequence:
    """A response's text in the teacher's tokens.

    Special tokens within the response have no text and no counterpart. The token that ends a
    response corresponds to the teacher's.

    Args:
        response_ids: The student's response.
        prompt_ids: The prompt in the teacher's tokens.
        student: The student's tokenizer, a fast one.
        teacher: The teacher's, a fast one.
        student_ends: Tokens that end a response of the student.
        teacher_end: The token that ends one of the teacher; None leaves the student's end without
            counterpart.
        max_tokens: What the teacher reads at most; a longer response is cut, and what is cut off
            has no counterpart.
    """
    finished = response_ids[-1] in student_ends and teacher_end is not None
    # A stop token may have a text: as the end of the turn it corresponds to the teacher's end.
    text, ends = decode_with_ends(student, response_ids[:-1] if finished else response_ids)
    ids, teacher_ends = encode_with_ends(teacher, text)
    pairs = pairs_of(ends, teacher_ends)
    if finished:
        assert teacher_end is not None
        pairs.append((len(response_ids) - 1, len(ids)))
        ids = [*ids, teacher_end]
    room = max(max_tokens - len(prompt_ids), 0)
    return TeacherSequence(
        prompt_ids=tuple(prompt_ids),
        response_ids=tuple(ids[:room]),
        pairs=tuple((s, t) for s, t in pairs if t < room),
    )
