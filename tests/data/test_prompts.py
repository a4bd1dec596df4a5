import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_oprd.data.chat import ChatFormat
from megatron_oprd.data.prompts import check_prompt_files, load_prompts, prompt_indices
from megatron_oprd.errors import UserError
from tests.helpers.tiny import tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
USER_ID, EOS_ID, ASSISTANT_ID = 3, 1, 4


def characters(text: str) -> tuple[int, ...]:
    """The tiny tokenizer's ids, looked up character by character."""
    return tuple(tiny_tokenizer().convert_tokens_to_ids(list(text)))


def message(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


def write_jsonl(path: Path, prompts: list[Any], key: str = "prompt") -> Path:
    path.write_text("".join(json.dumps({"id": 7, key: p}) + "\n" for p in prompts))
    return path


def write_parquet(path: Path, prompts: list[Any], key: str = "prompt") -> Path:
    pq.write_table(pa.table({"id": list(range(len(prompts))), key: prompts}), path)
    return path


def load(files: list[Path], **options: Any) -> list[tuple[int, tuple[int, ...]]]:
    chat = ChatFormat(template=options.pop("chat_template", None))
    arguments = {"tokenizer": tiny_tokenizer(), "chat": chat, "max_prompt_tokens": 64}
    return [(p.index, p.token_ids) for p in load_prompts(files, **(arguments | options))]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_text_stays_plain_text(tmp_path: Path, write: Callable[..., Path]) -> None:
    file = write(tmp_path / f"p.{write.__name__[6:]}", ["ab", "3+4"])
    assert load([file]) == [(0, characters("ab")), (1, characters("3+4"))]
    assert load([file], chat_template=False) == load([file])


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_messages_go_through_the_chat_template(tmp_path: Path, write: Callable[..., Path]) -> None:
    turns = [[message("ab")], [message("a"), message("b", "assistant"), message("c")]]
    file = write(tmp_path / f"p.{write.__name__[6:]}", turns)
    first = (USER_ID, *characters("ab"), EOS_ID, ASSISTANT_ID)
    second = (
        *(USER_ID, *characters("a"), EOS_ID),
        *(ASSISTANT_ID, *characters("b"), EOS_ID),
        *(USER_ID, *characters("c"), EOS_ID, ASSISTANT_ID),
    )
    for chat_template in (None, True):
        assert load([file], chat_template=chat_template) == [(0, first), (1, second)]
    with pytest.raises(UserError, match=r"data\.chat_template is false.*chat messages"):
        load([file], chat_template=False)


def test_chat_template_true_makes_text_a_user_message(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", ["ab"])
    expected = (USER_ID, *characters("ab"), EOS_ID, ASSISTANT_ID)
    assert load([file], chat_template=True) == [(0, expected)]


def test_files_are_one_data_set_and_long_prompts_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [
        write_jsonl(tmp_path / "a.jsonl", ["aaaa", "bb"]),
        write_parquet(tmp_path / "b.parquet", ["ccccc", "ddd"]),
    ]
    kept = load(files, max_prompt_tokens=3, prompt_key="prompt")
    assert kept == [(1, characters("bb")), (3, characters("ddd"))]
    assert "dropped 2 of 4 prompts" in caplog.text
    with pytest.raises(UserError, match=r"data\.max_prompt_tokens is 1.*shortest 2 tokens"):
        load(files, max_prompt_tokens=1)


def test_long_prompts_are_cut_to_their_end_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", ["abcd", "ab", "abcde"])
    with caplog.at_level("WARNING"):
        cut = load([file], max_prompt_tokens=3, long_prompts="cut")
    assert cut == [(0, characters("bcd")), (1, characters("ab")), (2, characters("cde"))]
    assert "cut 2 of 3 prompts to their last data.max_prompt_tokens=3 tokens" in caplog.text


def test_tokenizer_without_a_chat_template(tmp_path: Path) -> None:
    plain = tiny_tokenizer(chat_template=None)
    text = write_jsonl(tmp_path / "text.jsonl", ["ab"])
    chat = write_jsonl(tmp_path / "chat.jsonl", [[message("ab")]])
    assert load([text], tokenizer=plain) == [(0, characters("ab"))]
    with pytest.raises(UserError, match="no chat template"):
        load([chat], tokenizer=plain)
    with pytest.raises(UserError, match=r"data\.chat_template is true.*no chat template"):
        load([text], tokenizer=plain, chat_template=True)


def test_chat_template_that_refuses_a_prompt(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", ["ab"])
    picky = tiny_tokenizer(chat_template="{{ raise_exception('no users here') }}")
    with pytest.raises(UserError, match=r"p\.jsonl, line 1: no users here"):
        load([file], tokenizer=picky, chat_template=True)


BROKEN_FILES = {
    "missing": ("p.jsonl", None, r"data\.prompts: .*p\.jsonl does not exist"),
    "extension": ("p.csv", b"prompt\nab\n", r"p\.csv is not a prompt file.*\.jsonl or \.parquet"),
    "empty": ("p.jsonl", b"", r"p\.jsonl has no rows"),
    "blank": ("p.jsonl", b"\n \n", r"p\.jsonl has no rows"),
    "json": ("p.jsonl", b'\n{"prompt": "a"\n', r"p\.jsonl, line 2 is not JSON"),
    "not an object": ("p.jsonl", b'["a"]\n', r"line 1 is a JSON list"),
    "key": (
        "p.jsonl",
        b'{"id": 1, "promt": "a"}\n',
        r"has only 'id', 'promt'; did you mean 'promt'",
    ),
    "no near key": ("p.jsonl", b'{"id": 1}\n', r"data\.prompt_key is 'prompt'.* only 'id'$"),
    "encoding": ("p.jsonl", b'{"prompt": "\xff"}\n', r"cannot read .*p\.jsonl: .*utf-8"),
    "not parquet": ("p.parquet", b"PAR1 nonsense", r"cannot read .*p\.parquet"),
    "number": ("p.jsonl", b'{"prompt": 5}\n', r"line 1 is '5'; it must be a text"),
    "empty text": ("p.jsonl", b'{"prompt": ""}\n', "it must be a text"),
    "no messages": ("p.jsonl", b'{"prompt": []}\n', "it must be a text"),
    "no content": ("p.jsonl", b'{"prompt": [{"role": "user"}]}\n', "it must be a text"),
}


def check(files: Sequence[Path], **settings: Any) -> None:
    chat = ChatFormat(template=settings.pop("chat_template", None))
    check_prompt_files(files, tiny_tokenizer(), chat=chat, **settings)


def test_first_row_goes_through_the_template(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": [{"role": "user", "content": "a"}]}\n')
    check([file])
    without_template = tiny_tokenizer(chat_template=None)
    with pytest.raises(UserError, match="has no chat template"):
        check_prompt_files([file], without_template, chat=ChatFormat())
    with pytest.raises(UserError, match=r"data\.chat_template is false"):
        check([file], chat_template=False)


@pytest.mark.parametrize(("name", "content", "error"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_broken_files(tmp_path: Path, name: str, content: bytes | None, error: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=error):
        load([tmp_path / name])
    with pytest.raises(UserError, match=error):
        check([tmp_path / name])


def test_broken_parquet_columns(tmp_path: Path) -> None:
    wrong_key = write_parquet(tmp_path / "key.parquet", ["a"], key="prompts")
    no_rows = write_parquet(tmp_path / "rows.parquet", [])
    null = write_parquet(tmp_path / "null.parquet", ["a", None])
    for read in (load, check):
        with pytest.raises(UserError, match="has only 'id', 'prompts'; did you mean 'prompts'"):
            read([wrong_key])
        with pytest.raises(UserError, match="has no rows"):
            read([no_rows])
    with pytest.raises(UserError, match=r"null\.parquet, row 2"):
        load([null])


def test_a_later_broken_line_is_found_by_loading(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": \n')
    check([file])
    with pytest.raises(UserError, match="line 3"):
        load([file])


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"{SHARED_DATA} is not there")
def test_math_data_sets_load_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    files = [Path("../shared/data") / f"{name}.parquet" for name in ("aime24", "aime25", "aimo")]
    check(files)
    prompts = load(files, max_prompt_tokens=10_000)
    assert [index for index, _ in prompts] == list(range(30 + 30 + 83))
    question = pq.read_table(files[1])["prompt"][4].as_py()[0]["content"]
    text = tiny_tokenizer().decode(prompts[34][1])
    known = set(tiny_tokenizer().get_vocab()) | set(" \n")
    assert text == "<user>" + "".join(c if c in known else "<unk>" for c in question) + (
        "<eos><assistant>"
    )


def test_example_data() -> None:
    folder = REPOSITORY / "examples" / "data"
    train = load([folder / "math_train.jsonl"], max_prompt_tokens=200)
    heldout = load([folder / "math_heldout.jsonl"], max_prompt_tokens=200)
    assert (len(train), len(heldout)) == (64, 16)
    assert len({ids for _, ids in train + heldout}) == 80


def stream(steps: int, **options: Any) -> list[int]:
    return [i for step in range(steps) for i in prompt_indices(step, **options)]


def test_each_epoch_is_a_permutation() -> None:
    taken = stream(9, num_prompts=12, prompts_per_step=4, seed=3)
    epochs = [taken[:12], taken[12:24], taken[24:]]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(12)]}) == 4
    assert taken != stream(9, num_prompts=12, prompts_per_step=4, seed=4)


def test_the_stream_does_not_depend_on_the_step_size() -> None:
    options = {"num_prompts": 10, "seed": 0}
    whole = stream(30, prompts_per_step=1, **options)
    assert stream(10, prompts_per_step=3, **options) == whole
    assert stream(1, prompts_per_step=30, **options) == whole
    # 3 does not divide 10: every prompt still comes up once an epoch
    assert Counter(whole) == dict.fromkeys(range(10), 3)


def test_a_prompt_repeats_in_a_step_only_across_an_epochs_end() -> None:
    for step in range(40):
        indices = prompt_indices(step, num_prompts=10, prompts_per_step=4, seed=1)
        within_one_epoch = (step * 4) // 10 == (step * 4 + 3) // 10
        assert len(set(indices)) == 4 or not within_one_epoch


def test_unshuffled_prompts_come_in_order() -> None:
    taken = stream(4, num_prompts=5, prompts_per_step=2, seed=0, shuffle=False)
    assert taken == [0, 1, 2, 3, 4, 0, 1, 2]
