"""Renders prompts as a model reads them: chat templates, special tokens, and the end of a turn.

Any exception that transformers, Jinja or the tokenizers library raise about a row becomes a
UserError that names the row.
"""

import contextlib
import datetime
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_oprd.errors import UserError

Message = dict[str, str]

# The end of a generation prompt: opened for a model that thinks first, closed for one that must
# not.
_THINKING = re.compile(r"(<think>|\[THINK\])\s*(</think>|\[/THINK\])?\s*$")
_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_CLOCK = "strftime_now"
_PROBE = "zqjx"  # stands for a message's text where a template is looked at


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a prompt is rendered for a model."""

    # None: messages go through the tokenizer's chat template, text stays plain. True: text is one
    # user message. False: no template; messages are refused.
    template: bool | None = None
    # More arguments of the template, such as ``enable_thinking``.
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    # Whether to continue a final assistant message; otherwise it is refused.
    continue_final_message: bool = False
    # The date for templates that print one; None is the day of the call.
    today: datetime.date | None = None
    suffix: str = ""  # text after the rendered prompt

    def is_chat(self, content: str | list[Message]) -> bool:
        """Whether a prompt goes through the chat template."""
        return not isinstance(content, str) or bool(self.template)


def text_or_messages(
    where: str, value: Any, prompt_key: str, *, setting: str = "data.prompts"
) -> str | list[Message]:
    """Checks a prompt from a file, and returns it; the other arguments are for messages.

    Raises a UserError if it is neither a text nor a list of chat messages, is empty, or is a text
    that holds such a list.
    """
    if isinstance(value, str) and value:
        if _holds_messages(value):
            raise UserError(
                f"{setting}: {prompt_key!r} of {where} is a text that holds a JSON list of chat "
                "messages; give the list itself"
            )
        _check_text(where, value, setting)
        return value
    if isinstance(value, list) and value and all(map(_is_message, value)):
        for message in value:
            _check_text(where, message["content"], setting)
        return value
    raise UserError(
        f"{setting}: {prompt_key!r} of {where} is {str(value)[:80]!r}; it must be a text or a "
        "list of chat messages with the texts 'role' and 'content', not empty"
    )


def tokenize_prompt(
    where: str,
    content: str | list[Message],
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatFormat,
    *,
    whose: str = "student",
) -> tuple[int, ...]:
    """Token ids of a prompt.

    Messages go through the chat template with its generation prompt. Plain text gets the special
    tokens that the tokenizer puts in front, once. An end-of-sequence token that it appends is
    removed, because the text goes on.

    Args:
        where: The row, for messages.
        content: The prompt.
        tokenizer: The model's.
        chat: How it is rendered.
        whose: The model, for messages.

    Raises:
        UserError: The prompt has no tokens, needs a chat template that refuses it or is missing, or
            cannot be tokenized.
    """
    if chat.is_chat(content):
        rendered = _render(where, content, tokenizer, chat, whose)
        with _of_row(where, f"the {whose}'s tokenizer cannot read"):
            # The template has written the special tokens already.
            token_ids = tokenizer(rendered + chat.suffix, add_special_tokens=False)["input_ids"]
    else:
        assert isinstance(content, str)
        with _of_row(where, f"the {whose}'s tokenizer cannot read"):
            token_ids = _plain(content + chat.suffix, tokenizer)
    if not token_ids:
        raise UserError(f"data.prompts: the prompt of {where} has no tokens; remove it")
    return tuple(token_ids)


def turn_end(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> int | None:
    """The token that ends an assistant's turn in the chat template, or None if it cannot be told.

    It is the first token after the turn's text, if that is an added token of the tokenizer. (The
    tokenizer's own ``eos_token`` may be another one, which ends a document.)
    """
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = _apply(messages, tokenizer, chat, add_generation_prompt=False)
        _, found, behind = text.rpartition(_PROBE)
        token_ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"]
    except Exception:  # a template that refuses such a conversation tells nothing
        return None
    if not found or not token_ids or token_ids[0] not in tokenizer.added_tokens_decoder:
        return None
    return token_ids[0]


def thinking(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> str | None:
    """The thinking tags at the end of the generation prompt, "" if there are none.

    None without a template, or if it cannot be told.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        text = _apply(
            [{"role": "user", "content": _PROBE}], tokenizer, chat, add_generation_prompt=True
        )
    except Exception:  # what it refuses is found with the first row
        return None
    found = _THINKING.search(text.rpartition(_PROBE)[2] + chat.suffix)
    return "" if found is None else re.sub(r"\s+", "", found[0])


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Plain text with the tokenizer's leading special tokens, once, and none at the end."""
    token_ids = list(tokenizer(text)["input_ids"])
    alone = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    # Special tokens in the text itself stay: only those around its own tokens were added.
    while token_ids[-1:] == [eos] and token_ids[-len(alone) :] != alone:
        token_ids.pop()
    # The text begins with the token itself; the tokenizer would double it.
    if bos is not None and alone[:1] == [bos]:
        return alone
    return token_ids


def _render(
    where: str,
    content: str | list[Message],
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatFormat,
    whose: str,
) -> str:
    if chat.template is False:
        raise UserError(
            f"data.chat_template is false, but {where} is a list of chat messages; set it to true "
            "or null, or give the prompts as text"
        )
    if tokenizer.chat_template is None:
        found = "data.chat_template is true" if chat.template else f"{where} is chat messages"
        raise UserError(
            f"{found}, but the {whose}'s tokenizer has no chat template; give the prompts as text "
            "with data.chat_template null or false, or a tokenizer with a chat template"
        )
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    is_begun = messages[-1]["role"] == "assistant"
    if is_begun and not chat.continue_final_message:
        raise UserError(
            f"data.prompts: the last message of {where} is the assistant's, so that there is "
            "nothing to answer; leave it out, or set data.continue_final_message = true to have it "
            "continued"
        )
    with _of_row(where, f"the {whose}'s chat template refuses"):
        return _apply(
            messages,
            tokenizer,
            chat,
            add_generation_prompt=not is_begun,
            continue_final_message=is_begun,
        )


def asks_the_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template prints a date that `ChatFormat.today` cannot fix."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default", "")
    return _CLOCK in _DATE.sub("", template or "")


def _apply(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, **options: bool
) -> str:
    template = tokenizer.get_chat_template()
    if (today := chat.today) is not None:
        # Templates call strftime_now, which transformers binds to the clock, so the date is written
        # into the template. (Calls with a computed format stay; a run that is resumed on another
        # day then finds other prompts.)
        template = _DATE.sub(lambda call: repr(today.strftime(call[2])), template)
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **options, **dict(chat.kwargs)
    )


@contextlib.contextmanager
def _of_row(where: str, what: str) -> Iterator[None]:
    """Turns any exception of a library about a row into a one-line UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data.prompts: {what} {where}: {text[:300]}") from error


def _check_text(where: str, text: str, setting: str) -> None:
    # JSON can contain half a surrogate pair, which tokenizers cannot read.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{setting}: {where} has half of a surrogate pair, {text[error.start]!r}, which is no "
            "character; mend or remove the row"
        ) from error


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def _holds_messages(text: str) -> bool:
    if not text.lstrip().startswith("["):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))
