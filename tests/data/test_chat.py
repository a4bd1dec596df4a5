"""What a prompt becomes for a model, and what ends the model's turn."""

import datetime
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from megatron_oprd.data.chat import (
    ChatFormat,
    text_or_messages,
    thinking,
    tokenize_prompt,
    turn_end,
)
from megatron_oprd.data.prompts import TeacherPrompts
from megatron_oprd.errors import UserError
from tests.helpers.tiny import EOS, EOS_ID, PAD_ID, tiny_tokenizer

USER = [{"role": "user", "content": "hi"}]
# As Phi-4-mini's: turns end with one token, a document with another.
TWO_ENDS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<pad>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% else %}{{ eos_token }}{% endif %}"
)
THINKS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n' }}"
    "{% else %}{{ '<think>\\n' }}{% endif %}{% endif %}"
)


def rendered(content: Any, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> str:
    ids = tokenize_prompt("f, line 1", content, tokenizer, ChatFormat(**settings))
    return tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, None),
        ("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}", EOS_ID),
        (TWO_ENDS, PAD_ID),
        # Ends with a line break, or with nothing: not known.
        ("{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}", None),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", None),
        ("{{ raise_exception('no assistants') }}", None),
    ],
)
def test_the_end_of_a_turn_is_the_templates(template: str | None, end: int | None) -> None:
    assert turn_end(tiny_tokenizer(chat_template=template), ChatFormat()) == end


def test_template_arguments_and_suffix() -> None:
    tokenizer = tiny_tokenizer(chat_template=THINKS)
    off = {"enable_thinking": False}
    assert rendered(USER, tokenizer).endswith("<assistant><think>\n")
    assert rendered(USER, tokenizer, kwargs=off).endswith("<think>\n\n</think>\n")
    assert rendered(USER, tokenizer, kwargs=off, suffix="So, ").endswith("</think>\nSo, ")
    assert rendered("hi", tokenizer, suffix=" there") == "hi there"
    assert thinking(tokenizer, ChatFormat()) == "<think>"
    assert thinking(tokenizer, ChatFormat(kwargs=off)) == "<think></think>"
    assert thinking(tiny_tokenizer(), ChatFormat()) == ""
    assert thinking(tiny_tokenizer(), ChatFormat(suffix="<think>\n")) == "<think>"


def test_a_date_is_the_runs() -> None:
    dated = "{{ strftime_now('%d %b %Y') }}{{ strftime_now( \"%Y\" ) }}{{ messages[0]['content'] }}"
    tokenizer = tiny_tokenizer(chat_template=dated)
    day = datetime.date(2024, 3, 5)
    assert rendered(USER, tokenizer, today=day) == "05 Mar 20242024hi"
    assert rendered(USER, tokenizer, today=None).startswith(f"{datetime.date.today():%d %b %Y}")


def test_a_conversation_that_ends_with_the_assistant() -> None:
    begun = [*USER, {"role": "assistant", "content": "2 and"}]
    with pytest.raises(UserError, match=r"f, line 1 is the assistant's.*continue_final_message"):
        rendered(begun, tiny_tokenizer())
    assert rendered(begun, tiny_tokenizer(), continue_final_message=True).endswith(
        "<assistant>2 and"
    )


def with_special_tokens(*, bos: bool, eos: bool) -> PreTrainedTokenizerBase:
    """A tokenizer that puts them around plain text by itself."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<pad>"
    single = f"{'<pad> ' if bos else ''}$A{' <eos>' if eos else ''}"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<pad>", PAD_ID), ("<eos>", EOS_ID)]
    )
    return tokenizer


@pytest.mark.parametrize("text", ["hi", "<pad>hi", "hi<eos>"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_special_tokens_around_plain_text_come_once(text: str, bos: bool, eos: bool) -> None:
    """One token in front, none behind unless the text has it."""
    found = rendered(text, with_special_tokens(bos=bos, eos=eos))
    front = "<pad>" if bos and not text.startswith("<pad>") else ""
    assert found == front + text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('[{"role": "user", "content": "hi"}]', "a text that holds a JSON list of chat messages"),
        ("a\ud83db", "half of a surrogate pair"),
        ([{"role": "user", "content": "a\ud83db"}], "half of a surrogate pair"),
        ([{"role": "user", "content": None}], "must be a text or a list"),
    ],
)
def test_rows_that_are_no_prompts(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"f, line 3.*{message}"):
        text_or_messages("f, line 3", value, "prompt")


def test_text_that_only_looks_like_json_stays() -> None:
    for text in ("[1, 2] is a list", "[]", '[{"a": 1}]', "[" * 10000):
        assert text_or_messages("f, line 1", text, "prompt") == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages + 1 }}",
        "{{ raise_exception('no users here') }}",
        "{{ messages[0].content.no.such.thing }}",
        {"tool_use": "{{ messages }}"},
    ],
)
def test_what_a_library_raises_is_one_line(template: Any) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    with pytest.raises(UserError, match="chat template refuses f, line 1: ") as raised:
        rendered(USER, tokenizer)
    assert "\n" not in str(raised.value)


def test_end_of_the_teachers_answer_by_prompt() -> None:
    """Of a turn behind messages, of a document behind plain text."""
    prompts = TeacherPrompts(
        tokenizer=tiny_tokenizer(chat_template=TWO_ENDS),
        privileged_key=None,
        template="{prompt}",
        max_tokens=9,
        chat=ChatFormat(),
    )
    assert prompts.end_behind(USER) == PAD_ID
    assert prompts.end_behind("plain") == EOS_ID
    assert prompts.tokenizer.eos_token == EOS


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), None, "", [1]])
def test_privileged_values_that_are_no_text(value: Any) -> None:
    prompts = TeacherPrompts(
        tokenizer=tiny_tokenizer(),
        privileged_key="answer",
        template="{prompt}: {privileged}",
        max_tokens=99,
        chat=ChatFormat(),
    )
    with pytest.raises(UserError, match=r"f, line 1 has .*must be a text or a number"):
        prompts.content("f, line 1", "q", value)
    assert prompts.content("f, line 1", "q", 12) == "q: 12"
    system = [{"role": "system", "content": "be brief"}, *USER]
    assert prompts.content("f, line 1", system, "x") == [
        system[0],
        {"role": "user", "content": "hi: x"},
    ]
