"""Benchmark files: which rows count, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_oprd.data.benchmarks import check_length, load_benchmarks, tokenized
from megatron_oprd.data.chat import ChatFormat
from megatron_oprd.errors import UserError
from tests.helpers.tiny import tiny_tokenizer

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def row(question: str, answer: Any, **fields: Any) -> dict[str, Any]:
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "reward_model": {"ground_truth": answer, "style": "rule"}, **fields}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.mark.parametrize("name", ["maths.parquet", "maths.jsonl"])
def test_each_prompt_counts_once(tmp_path: Path, name: str) -> None:
    rows = [row("1+1", "2"), row("2+2", "5"), row("1+1", "2"), row("2+2", "4"), row("3", "3")]
    file = write(tmp_path / name, [{**one, "id": "x"} for one in rows])
    (benchmark,) = load_benchmarks([file])
    assert benchmark.name == "maths"
    assert [(p.index, p.answer) for p in benchmark.problems] == [(0, "2"), (4, "3")]
    assert (benchmark.num_rows, benchmark.num_repeated, benchmark.num_contradicting) == (5, 1, 2)
    assert benchmark.describe() == (
        "maths: 2 problems, 1 repeated rows left out, 2 rows with contradicting answers left out"
    )
    (first,) = load_benchmarks([file], limit=1)
    assert first.problems == benchmark.problems[:1]
    assert first.fingerprint() != benchmark.fingerprint()


def test_an_instruction_is_put_behind_the_problem(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [row("1+1", 2), {**row("", "3"), "prompt": "2+1"}])
    (benchmark,) = load_benchmarks([file], instruction="box it")
    assert benchmark.problems[0].content == [{"role": "user", "content": "1+1\n\nbox it"}]
    assert benchmark.problems[1].content == "2+1\n\nbox it"
    assert benchmark.problems[0].answer == "2"
    tokenizer = tiny_tokenizer()
    prompts = tokenized(benchmark, tokenizer, ChatFormat())
    text = tokenizer.decode(prompts[0].token_ids)
    assert text == "<user>1+1\n\nbox it<eos><assistant>"
    length = len(prompts[0].token_ids)
    check_length("a", prompts, 10, length + 10)
    with pytest.raises(UserError, match=rf"row 1, {length} tokens.*give at most 9"):
        check_length("a", prompts, 10, length + 9)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        (
            [{"prompt": "a"}],
            "the right answer is 'reward_model.ground_truth', but .*line 1 has only 'prompt'",
        ),
        (
            [{"question": "a", "reward_model": {"ground_truth": "1"}}],
            "a benchmark's prompt is 'prompt', but .* has only 'question', 'reward_model'",
        ),
        ([row("a", "1"), row("b", " ")], r"reward_model.ground_truth of .*line 2 is ' '"),
        (
            [{"prompt": "a", "reward_model": "1"}],
            r"reward_model.ground_truth', but .*line 1 has '1' there",
        ),
        ([{**row("a", "1"), "prompt": 5}], "--data: 'prompt' of .*line 1 is '5'"),
        ([row("a", "1"), row("a", "2")], "every row of"),
    ],
)
def test_unusable_files(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_benchmarks([write(tmp_path / "a.jsonl", rows)])


def test_files_that_are_no_benchmarks(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "b").mkdir()
    one = write(tmp_path / "a.jsonl", [row("a", "1")])
    two = write(tmp_path / "b" / "a.jsonl", [row("a", "1")])
    for files, message in (
        ([tmp_path / "none.parquet"], "--data: .*none.parquet does not exist"),
        ([tmp_path / "broken.parquet"], "cannot read .*broken.parquet"),
        ([one, two], "two files called 'a'"),
        ([], "names no file"),
    ):
        with pytest.raises(UserError, match=message):
            load_benchmarks(files)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="../shared/data is not there")
def test_published_files_as_they_are() -> None:
    """The numbers were counted apart from this code, by grouping the prompts' JSON."""
    benchmarks = load_benchmarks(sorted(SHARED_DATA.glob("*.parquet")))
    numbers = {b.name: (len(b.problems), b.num_repeated, b.num_contradicting) for b in benchmarks}
    assert numbers == {
        "aime24": (30, 0, 0),
        "aime25": (30, 0, 0),
        "aimo": (83, 0, 0),
        "dapo-math-17k": (17391, 512, 14),
        "math-500": (500, 0, 0),
    }
