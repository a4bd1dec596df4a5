"""Pairs of tokens of two tokenizers: properties on text of many kinds, and known cases."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_oprd.data.teacher_sequences import (
    TeacherSequence,
    decode_with_ends,
    encode_with_ends,
    in_other_tokens,
    pairs_of,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. 12 + 34 = 46, so x = 7.",
    "def f(x):\n    return x ** 2  # squares\n\tif y != None: pass",
    "naïve café Ünïcödé — “quotes” … ½ €",
    "你好,世界。今天天气很好 こんにちは世界",
    "😀 👩‍🚀 🇩🇪 e\u0301 a\u0308",
] * 20
PIECES = ["the ", "def f(x):\n", "  ", "\t", "\n\n", "12345", "é", "e\u0301", "世界", "👩‍🚀", "🇩🇪",
          "<s>", "</s>", "<|end|>", " ", ".", "…", "½", "x**2"]  # fmt: skip
TEXTS = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0\r▁\ufffd")),
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
)


def byte_level() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def sentence_piece(folder: Path) -> PreTrainedTokenizerBase:
    """Loaded from a folder with a `tokenizer.model`, as an old Llama's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=450,
        byte_fallback=True,
        model_type="bpe",
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerBase]:
    return {
        "byte_level": byte_level(),
        "sentence_piece": sentence_piece(tmp_path_factory.mktemp("sentence_piece")),
    }


@pytest.fixture(scope="module", params=["byte_level", "sentence_piece"])
def both(
    request: pytest.FixtureRequest, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    first = request.param
    second = next(name for name in tokenizers if name != first)
    return tokenizers[first], tokenizers[second]


def prefix_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    return [tokenizer.decode(ids[: n + 1], skip_special_tokens=True) for n in range(len(ids))]


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_pairs_end_at_the_same_character(
    both: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase], text: str
) -> None:
    student, teacher = both
    sampled = student(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    read, ends = decode_with_ends(student, sampled)
    assert len(ends) == len(sampled)
    assert read == student.decode(sampled, skip_special_tokens=True)
    # What a token ends with is what the tokens up to it decode to.
    for prefix, end in zip(prefix_texts(student, sampled), ends, strict=True):
        assert end is None or prefix == read[:end]
    ids, teacher_ends = encode_with_ends(teacher, read)
    assert len(teacher_ends) == len(ids)
    found = [end for end in teacher_ends if end is not None]
    assert found == sorted(set(found))
    if read and teacher.decode(ids) == read:
        assert found[-1] == len(read)
        for prefix, end in zip(prefix_texts(teacher, ids), teacher_ends, strict=True):
            assert end is None or prefix == read[:end]
    pairs = pairs_of(ends, teacher_ends)
    assert pairs == sorted(pairs)
    for axis in (0, 1):
        assert len({pair[axis] for pair in pairs}) == len(pairs)
    assert all(ends[s] == teacher_ends[t] is not None for s, t in pairs)
    # Nothing that could be paired is left out.
    assert len(pairs) == len({e for e in ends if e is not None} & set(found))
    assert pairs == pairs_of(ends, teacher_ends)
    assert (read, ends) == decode_with_ends(student, sampled)


@settings(max_examples=50, deadline=None)
@given(text=TEXTS)
def test_one_tokenizer_pairs_every_token_that_ends_a_character(
    tokenizers: dict[str, PreTrainedTokenizerBase], text: str
) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    read, ends = decode_with_ends(tokenizer, ids)
    again, again_ends = encode_with_ends(tokenizer, read)
    if again == ids:
        expected = [(n, n) for n, end in enumerate(ends) if end is not None]
        assert pairs_of(ends, again_ends) == expected


@pytest.mark.parametrize(
    ("names", "text", "ends"),
    [
        (["a", "<0x0A>", "<0xFF>", "a"], "a\na", [1, 2, None, 3]),
        (["<0x0A>", "<0xE2>", "<0x82>", "a"], "\na", [1, None, None, 2]),
        (["<0xE2>", "<0xE2>", "<0x82>", "<0xAC>", "a"], "€a", [None, None, None, 1, 2]),
        (["<0x0A>", "▁", "a", "<0xAC>"], "\n a", [1, 2, 3, None]),
    ],
)
def test_sampled_bytes_that_are_no_character_have_no_text(
    tokenizers: dict[str, PreTrainedTokenizerBase],
    names: list[str],
    text: str,
    ends: list[int | None],
) -> None:
    tokenizer = tokenizers["sentence_piece"]
    assert decode_with_ends(tokenizer, tokenizer.convert_tokens_to_ids(names)) == (text, ends)


def test_tokens_inside_a_character_and_special_tokens_have_no_end(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    tokenizer = tokenizers["byte_level"]
    encode: Callable[[str], list[int]] = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    kiwi = encode("🥝")
    inside = [None] * (len(kiwi) - 1)
    assert inside, "it is no token of its own"
    text, ends = decode_with_ends(tokenizer, [*encode("a"), *kiwi, 0, *encode("b")])
    assert (text, ends) == ("a🥝b", [1, *inside, 2, None, 3])
    # A character that never becomes whole is no text.
    text, ends = decode_with_ends(tokenizer, [*encode("a"), *kiwi[:-1]])
    assert (text, ends) == ("a", [1, *inside])


def test_what_looks_like_a_special_token_is_text(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    for tokenizer in tokenizers.values():
        special = set(tokenizer.all_special_ids)
        ids, ends = encode_with_ends(tokenizer, "a <s> </s> <|end|> b")
        assert not special & set(ids)
        assert ends[-1] == len("a <s> </s> <|end|> b")


def test_a_tokenizer_that_composes_characters() -> None:
    """Of NFC's é the mark behind the e is read, too: pairs are those without composing."""
    composing = byte_level()
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    text = "a e\u0301b n\u0303c"  # e and n are followed by a mark each
    for tokenizer in (composing, byte_level()):
        _, ends = encode_with_ends(tokenizer, text)
        found = {end for end in ends if end is not None}
        assert {4, 8, len(text)} <= found
    _, ends = encode_with_ends(composing, text)
    # No token of it ends between a letter and its mark.
    assert not {3, 7} & {end for end in ends if end is not None}


@pytest.mark.parametrize("end", [7, None])
def test_the_end_of_a_response_and_what_is_cut(end: int | None) -> None:
    student, teacher = byte_level(), byte_level()
    ids, _ = encode_with_ends(student, "jumps over")
    finished = [*ids, 0]

    def read(response: list[int], max_tokens: int) -> TeacherSequence:
        return in_other_tokens(
            response, [1, 2, 3], student=student, teacher=teacher, student_ends=(0, 5),
            teacher_end=end, max_tokens=max_tokens,
        )  # fmt: skip

    whole = read(finished, 100)
    same = [(number, number) for number in range(len(ids))]
    ends = [(len(ids), len(ids))] if end is not None else []
    assert list(whole.pairs) == same + ends
    assert list(whole.response_ids) == [*ids, *([end] if end is not None else [])]
    # A stop token that has a text of its own is the end all the same, and in one pair only.
    stopped = read([*ids, 5], 100)
    assert list(stopped.pairs) == (same + ends if end is not None else [*same, (len(ids),) * 2])
    assert list(read(list(ids), 100).pairs) == same
    # Room for all of the response but its last two tokens: no pair lies behind the cut.
    cut = read(finished, 3 + len(ids) - 2)
    assert list(cut.response_ids) == list(ids[:-2])
    assert list(cut.pairs) == same[:-2]
