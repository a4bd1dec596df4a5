import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_oprd.data.tokenizers import (
    check_same_tokenizer,
    eos_token_ids,
    load_tokenizer,
    pad_token_id,
)
from megatron_oprd.errors import UserError
from tests.helpers.tiny import EOS_ID, PAD_ID, tiny_config, tiny_tokenizer


def save(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def edit_json(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields))


def test_loads_a_saved_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(tmp_path))
    text = "What is 3 + 4?\n<user>"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS_ID, PAD_ID)


def test_tokenizer_json_is_taken_as_it_stands(tmp_path: Path) -> None:
    # A word-level pipeline in a Qwen2 folder: AutoTokenizer would replace it by byte-level BPE.
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
    tiny_config("qwen2").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("two one three")["input_ids"] == [2, 1, 0]


def test_without_tokenizer_json_the_family_decides(tmp_path: Path) -> None:
    tiny_config("qwen2").save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    expected = AutoTokenizer.from_pretrained(tmp_path)("abba")["input_ids"]
    assert load_tokenizer(tmp_path)("abba")["input_ids"] == expected == [3, 2, 1]


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer.*tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read the tokenizer of"):
        load_tokenizer(tmp_path)


def test_same_tokenizer_passes_with_another_chat_template(tmp_path: Path) -> None:
    student = save(tmp_path / "student")
    teacher = save(tmp_path / "teacher", tiny_tokenizer(chat_template="{{ messages }}"))
    check_same_tokenizer(student, teacher)


def test_other_token_at_one_id(tmp_path: Path) -> None:
    student, teacher = save(tmp_path / "student"), save(tmp_path / "teacher")
    file = teacher / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["d"] = vocab["d"], vocab["a"]
    file.write_text(json.dumps(content))
    lower = min(vocab["a"], vocab["d"])
    with pytest.raises(UserError, match=rf"token id {lower} is 'a' .* 'd' .*; otherwise"):
        check_same_tokenizer(student, teacher, otherwise="; otherwise")


def test_larger_vocabulary(tmp_path: Path) -> None:
    student = save(tmp_path / "student", tiny_tokenizer(120))
    teacher = save(tmp_path / "teacher", tiny_tokenizer(121))
    with pytest.raises(UserError, match=r"id 120 is None .* '<extra_\d+>' .*120 and 121 tokens"):
        check_same_tokenizer(student, teacher)


def test_added_token_that_is_special_for_one_only(tmp_path: Path) -> None:
    for name, special in (("student", True), ("teacher", False)):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens([AddedToken("<think>", special=special)])
        save(tmp_path / name, tokenizer)
    with pytest.raises(UserError, match=r"97 \('<think>'\) is a special token .* an added token"):
        check_same_tokenizer(tmp_path / "student", tmp_path / "teacher")


def test_another_end_of_sequence_token_is_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = save(tmp_path / "student"), save(tmp_path / "teacher")
    check_same_tokenizer(student, teacher)
    assert not caplog.records
    edit_json(teacher / "tokenizer_config.json", eos_token="<user>")
    check_same_tokenizer(student, teacher)
    assert "'<eos>', the teacher's '<user>'" in caplog.text


@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        ({}, (1,)),
        ({"eos_token_id": 0}, (0, 1)),
        ({"eos_token_id": 4}, (1, 4)),
        ({"eos_token_id": [9, 1, 4]}, (1, 4, 9)),
    ],
)
def test_eos_token_ids(
    tmp_path: Path, configured: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert eos_token_ids(tmp_path, tiny_tokenizer()) == (1,)
    edit_json(tmp_path / "generation_config.json", **configured)
    assert eos_token_ids(tmp_path, tiny_tokenizer()) == expected


def test_eos_of_config_json_where_the_other_file_names_none(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    edit_json(tmp_path / "config.json", eos_token_id=[4, 7], vocab_size=97)
    assert eos_token_ids(tmp_path, tokenizer) == (1, 4, 7)
    edit_json(tmp_path / "generation_config.json", do_sample=True)
    assert eos_token_ids(tmp_path, tokenizer) == (1, 4, 7)
    edit_json(tmp_path / "generation_config.json", eos_token_id=9)
    assert eos_token_ids(tmp_path, tokenizer) == (1, 9)


@pytest.mark.parametrize("wrong", [97, -1, 10**9])
def test_eos_ids_that_are_no_tokens(tmp_path: Path, wrong: int) -> None:
    edit_json(tmp_path / "generation_config.json", eos_token_id=[1, wrong])
    with pytest.raises(UserError, match=rf"generation_config.json .*{wrong} is not .* 0 to 96"):
        eos_token_ids(tmp_path, tiny_tokenizer())
    edit_json(tmp_path / "generation_config.json", eos_token_id=True)
    with pytest.raises(UserError, match="it must be a token id"):
        eos_token_ids(tmp_path, tiny_tokenizer())


def test_eos_token_ids_errors(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    edit_json(tmp_path / "generation_config.json", eos_token_id="<eos>")
    with pytest.raises(UserError, match="'<eos>'; it must be a token id"):
        eos_token_ids(tmp_path, tokenizer)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*generation_config\.json"):
        eos_token_ids(tmp_path, tokenizer)
    (tmp_path / "generation_config.json").unlink()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="names no end-of-sequence token"):
        eos_token_ids(tmp_path, tokenizer)


def test_pad_token_id() -> None:
    tokenizer = tiny_tokenizer()
    assert pad_token_id(tokenizer) == PAD_ID
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == EOS_ID
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a padding nor an end-of-sequence"):
        pad_token_id(tokenizer)
