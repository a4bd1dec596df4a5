"""The sequences that the teacher reads if they differ from the student's, and the token pairs.

A teacher with privileged text in its prompt reads the student's response after another prompt. A
teacher with another tokenizer reads the same text in its own tokens. Two positions correspond if
their tokens end at the same character.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from megatron_oprd.config.schema import Alignment
from megatron_oprd.data.prompts import Prompt, TeacherPrompts

Ends = list[int | None]
Pair = tuple[int, int]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def decode_with_ends(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]
) -> tuple[str, Ends]:
    """The text of sampled tokens, and the number of characters up to the end of each token.

    The tokens may differ from those that the tokenizer would make of the text. The end is None for
    a token that ends inside a character (byte-level and byte-fallback tokens) or has no text:
    special tokens, and byte-fallback tokens that do not form a character. Needs a fast tokenizer.
    """
    stream = DecodeStream(skip_special_tokens=True)
    stray = _stray_bytes(tokenizer, token_ids)
    text, ends, length = [], Ends(), 0
    for number, token_id in enumerate(token_ids):
        if number in stray:
            ends.append(None)
            continue
        piece = stream.step(tokenizer.backend_tokenizer, token_id)
        if piece:
            text.append(piece)
            length += len(piece)
        ends.append(length if piece else None)
    return "".join(text), ends


def _stray_bytes(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> set[int]:
    """Indices of the byte-fallback tokens that are not part of a character.

    A single one makes the decoder turn its whole run of byte tokens into U+FFFD. The stream may
    have returned some of them as text by then, and raises an error.
    """
    if "ByteFallback" not in str(tokenizer.backend_tokenizer.decoder):
        return set()
    stray: set[int] = set()
    run: list[tuple[int, int]] = []  # of byte tokens: number and byte
    for number, name in enumerate([*tokenizer.convert_ids_to_tokens(list(token_ids)), None]):
        if found := _BYTE_TOKEN.fullmatch(name or ""):
            run.append((number, int(found[1], 16)))
            continue
        while run:
            width = _width_of_character(bytes(byte for _, byte in run[:4]))
            if width == 0:
                stray.add(run[0][0])
            run = run[max(width, 1) :]
    return stray


def _width_of_character(following: bytes) -> int:
    """The bytes, at most 4, of the first character in UTF-8; 0 if there is no valid character."""
    for width in range(1, len(following) + 1):
        try:
            following[:width].decode()
        except UnicodeDecodeError:
            continue
        return width
    return 0


def encode_with_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], Ends]:
    """A text's tokens without special tokens around them, and their ends as in `decode_with_ends`.

    Special tokens that are spelled out in the text are split like plain text. Needs a fast
    tokenizer.
    """
    encoding = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
    )
    offsets = encoding["offset_mapping"]
    ends = Ends()
    for number, (start, end) in enumerate(offsets):
        following = offsets[number + 1][0] if number + 1 < len(offsets) else len(text)
        # If tokens share a character, only the last ends with it.
        if end <= start or following < end:
            ends.append(None)
            continue
        # A tokenizer that composes characters (NFC) reports the end of a composed character's first
        # part; the marks after it belong to no token.
        while end < following and _belongs_to_the_one_before(text[end]):
            end += 1
        ends.append(end)
    return encoding["input_ids"], ends


def _belongs_to_the_one_before(character: str) -> bool:
    """Whether it is a combining mark, or the rest of a Hangul syllable."""
    return bool(unicodedata.combining(character)) or "\u1160" <= character <= "\u11ff"


def pairs_of(first: Sequence[int | None], second: Sequence[int | None]) -> list[Pair]:
    """Pairs (index in first, index in second) of tokens that end at the same character.

    Both sequences have ends as above, of the same text. Both indices rise from pair to pair, and
    each token is in at most one pair.
    """
    number_of = {end: number for number, end in enumerate(second) if end is not None}
    pairs: list[Pair] = []
    for number, end in enumerate(first):
        if end is not None and end in number_of:
            pairs.append((number, number_of[end]))
    return pairs


@dataclass(frozen=True, kw_only=True)
class TeacherSequence:
    """One rollout as the teacher reads it."""

    prompt_ids: tuple[int, ...]  # at least one
    response_ids: tuple[int, ...]
    # (student's response token, teacher's response token) from 0, rising; may be empty.
    pairs: tuple[Pair, ...]

    def positions(self, alignment: Alignment, *, response_length: int) -> list[int | None]:
        """The teacher's position that each response token of the student is compared with, or None.

        Positions include the prompt. ``alignment`` is ``token`` for the position of the token that
        ends at the same character, or ``predictor`` for the position before the token that starts
        at the same character, the last of the prompt included.
        """
        positions: list[int | None] = [None] * response_length
        start, ahead = len(self.prompt_ids), 0 if alignment == "token" else 1
        # A token starts where the token before it ends, so a pair of ends aligns the predictors of
        # the next tokens. (-1, -1) is the end of the prompt.
        for of_student, of_teacher in [*([(-1, -1)] if ahead else []), *self.pairs]:
            if of_student + ahead < response_length:
                positions[of_student + ahead] = start + of_teacher
        return positions


def with_other_prompt(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> TeacherSequence:
    """The student's response after another prompt, token for token."""
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
        teacher: The teacher's tokenizer, a fast one.
        student_ends: Tokens that end a response of the student.
        teacher_end: The token that ends a response of the teacher; None leaves the student's end
            without a counterpart.
        max_tokens: Longer sequences are truncated; truncated tokens have no counterpart.
    """
    finished = response_ids[-1] in student_ends and teacher_end is not None
    # A stop token may have text, but as the end of the turn it corresponds to the teacher's end
    # token.
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


@dataclass(frozen=True, kw_only=True)
class TeacherReader:
    """Makes the teacher's sequence of a rollout."""

    prompts: TeacherPrompts
    # Whether it reads responses in its own tokens or in the student's.
    own_tokens: bool
    student_tokenizer: PreTrainedTokenizerBase
    student_ends: tuple[int, ...]  # tokens that end a response of the student
    max_tokens: int  # longer sequences are truncated

    def read(self, prompt: Prompt, response_ids: Sequence[int]) -> TeacherSequence:
        """The teacher's sequence for a response and its ``prompt``, loaded with ``prompts``."""
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
