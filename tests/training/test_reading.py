"""What a plan says of the two chat templates."""

import logging
import re
from pathlib import Path

import pytest

from megatron_oprd.training.plan import make_plan
from tests.helpers.pairs import config_of, save_pair
from tests.helpers.tiny import tiny_tokenizer

TURNS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
THINKS = TURNS.replace("'<assistant>'", "'<assistant><think>'")
NO_END = TURNS.replace(" + '<eos>'", "")
LITERAL_DATE = "{{ strftime_now('%d %b %Y') }}" + TURNS
COMPUTED_DATE = "{% set f = '%d' %}{{ strftime_now(f) }}" + TURNS
OWN = "teacher_prompt.tokenizer=own"


@pytest.mark.parametrize(
    ("student", "teacher", "overrides", "warning"),
    [
        (TURNS, TURNS, [], None),
        (THINKS, THINKS, [], None),
        (TURNS, THINKS, [], "model.teacher .* ends with '<think>', what it reads here with ''"),
        (
            TURNS,
            THINKS,
            [OWN],
            "model.student .* ends with '', that of model.teacher with '<think>",
        ),
        (THINKS, TURNS, ["teacher_prompt.suffix=<think>", OWN], None),
        (TURNS, NO_END, [OWN], "chat template of model.teacher .* ends its turn"),
        (TURNS, NO_END, [], None),
        (COMPUTED_DATE, TURNS, [], "model.student prints the date"),
        (LITERAL_DATE, TURNS, [], None),
    ],
)
def test_generation_prompts_and_ends_of_turns(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    student: str,
    teacher: str,
    overrides: list[str],
    warning: str | None,
) -> None:
    pair = save_pair(tmp_path / "pair", "llama")
    for model, template in (("student", student), ("teacher", teacher)):
        tiny_tokenizer(chat_template=template).save_pretrained(pair / model)
    with caplog.at_level(logging.WARNING, logger="megatron_oprd.training.reading"):
        make_plan(config_of(pair, ["data.chat_template=true", *overrides]), world_size=1)
    found = [record.getMessage() for record in caplog.records]
    if warning is None:
        assert not found
    else:
        (message,) = found
        assert re.search(warning, message)
