"""Which tokens of two tokenizations of one text end at the same character.

Two positions correspond when their tokens end at the same character: both models have then read
the same text. Offsets count Unicode code points of the text.
"""

import re
import unicodedata
from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

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
