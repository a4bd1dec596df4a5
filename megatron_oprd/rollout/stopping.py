"""Texts that end a response."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import StoppingCriteria


class StopTexts(StoppingCriteria):
    """Ends a row with the token that completes one of some texts, and notes where that was.

    transformers' own `StopStringCriteria` also looks at the prompt, which may end with a part of a
    stop text, and does not say where the text was.

    Attributes:
        lengths: For each row, the tokens of its response up to and with the one that completed a
            text; None as long as none did.
    """

    def __init__(
        self,
        stop: Sequence[str],
        decode: Callable[[Sequence[int]], str],
        *,
        prompt_width: int,
        num_rows: int,
    ):
        """Knows of no token yet.

        Args:
            stop: The texts, none empty.
            decode: Token ids -> text, special tokens kept.
            prompt_width: Tokens of each row that are its prompt.
            num_rows: Rows of the batch.
        """
        self.lengths: list[int | None] = [None] * num_rows
        self._stop = tuple(stop)
        self._decode = decode
        self._prompt_width = prompt_width
        self._window = _window(stop)

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_: object) -> Tensor:
        """Which rows ([b], bool) have ended; ``input_ids`` is [b, s] with the newest token."""
        length = input_ids.shape[1] - self._prompt_width
        start = self._prompt_width + max(0, length - self._window)
        for row, tokens in enumerate(input_ids[:, start:].tolist()):
            if self.lengths[row] is None and any(
                text in self._decode(tokens) for text in self._stop
            ):
                self.lengths[row] = length
        return torch.tensor([n is not None for n in self.lengths], device=input_ids.device)


def stopped_length(
    tokens: Sequence[int], stop: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> int | None:
    """Where `StopTexts` would have ended a response that was generated to its end.

    Args:
        tokens: The response.
        stop: The texts, none empty.
        decode: Token ids -> text, special tokens kept.

    Returns:
        The tokens up to and with the one that completed a text; None if none did.
    """
    whole = decode(tokens)
    if not any(text in whole for text in stop):
        return None
    window = _window(stop)
    for end in range(1, len(tokens) + 1):
        part = decode(tokens[max(0, end - window) : end])
        if any(text in part for text in stop):
            return end
    return None


def _window(stop: Sequence[str]) -> int:
    """The last tokens of a response that can complete one of the texts."""
    # A token is at least one byte of text. The rest is for decoders that treat the first tokens
    # otherwise (a space, a part of a character).
    return max(len(text.encode()) for text in stop) + 8
