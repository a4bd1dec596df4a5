"""The sequences that the teacher reads when they differ from the student's, and the token pairs.

A teacher with privileged text in its prompt reads the student's response after another prompt. A
teacher with another tokenizer reads the same text in other tokens. Two positions correspond when
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
    """The text of sampled tokens, and where in it each token ends.

    The tokens need not be those that the tokenizer would make of the text.

    Args:
        tokenizer: A fast tokenizer.
        token_ids: Token ids; special tokens have no text, nor have byte-fallback tokens that
            make up no character.

    Returns:
        The text, and for each token the number of characters up to its end; None for a token that
        ends inside a character (byte-level and byte-fallback tokens) or has no text.
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
    """Numbers of the byte-fallback tokens that are no part of a character.

    One such token makes the decoder turn every other of its run, too, into U+FFFD: also those that
    the stream has given as text already, which is an error there.
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
    """How many of these bytes, at most 4, are the first character in UTF-8; 0 if none are."""
    for width in range(1, len(following) + 1):
        try:
            following[:width].decode()
        except UnicodeDecodeError:
            continue
        return width
    return 0


def encode_with_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], Ends]:
    """A text's tokens, without special tokens around them, and where in it each ends.

    Args:
        tokenizer: A fast tokenizer.
        text: What is tokenized; what looks like a special token in it is taken as plain text.

    Returns:
        Token ids and ends, as `decode_with_ends` gives them.
    """
    encoding = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
    )
    offsets = encoding["offset_mapping"]
    ends = Ends()
    for number, (start, end) in enumerate(offsets):
        following = offsets[number + 1][0] if number + 1 < len(offsets) else len(text)
        # Of tokens that share a character only the last ends with it.
        if end <= start or following < end:
            ends.append(None)
            continue
        # A tokenizer that composes characters (NFC) says that a composed one ends where its first
        # part does: the marks behind it are no token's.
        while end < following and _belongs_to_the_one_before(text[end]):
            end += 1
        ends.append(end)
    return encoding["input_ids"], ends


def _belongs_to_the_one_before(character: str) -> bool:
    """Whether it is a mark on the character before it, or the rest of a Hangul syllable."""
    return bool(unicodedata.combining(character)) or "\u1160" <= character <= "\u11ff"


def pairs_of(first: Sequence[int | None], second: Sequence[int | None]) -> list[Pair]:
    """Pairs of tokens, one of each tokenization, that end at the same character.

    Both numbers rise from pair to pair; each token is in one pair at most.

    Args:
        first: Ends of the tokens, as above.
        second: Those of the other tokenization of the same text.
    """
    number_of = {end: number for number, end in enumerate(second) if end is not None}
    pairs: list[Pair] = []
    for number, end in enumerate(first):
        if end is not None and end in number_of:
            pairs.append((number, number_of[end]))
    return pairs


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
