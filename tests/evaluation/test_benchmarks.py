"""The whole evaluation on benchmarks, on tiny models; interrupted, and with other settings."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from megatron_oprd import evaluate
from megatron_oprd.errors import UserError
from megatron_oprd.rollout.hf import HFEngine
from tests.data.test_benchmarks import row, write
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_tokenizer

pytestmark = pytest.mark.long

QUESTIONS = [("1+1", "2"), ("what is 2*3", "6"), ("12-7", "5"), ("1+1", "2"), ("9", "9")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    for name, seed in (("student", 1), ("teacher", 2)):
        save_tiny_model(root / name, tiny_config("llama", num_hidden_layers=2), seed=seed)
    hf_to_megatron(root / "student", root / "megatron", Settings())
    rows = [row(question, answer) for question, answer in QUESTIONS]
    write(root / "sums.parquet", rows)
    write(root / "few.jsonl", rows[:2])
    return root


def run(
    monkeypatch: pytest.MonkeyPatch, root: Path, output: Path, options: str, data: str = "sums"
) -> dict[str, Any]:
    suffix = {"sums": "parquet", "few": "jsonl"}
    files = " ".join(f"{root}/{name}.{suffix[name]}" for name in data.split())
    arguments = (
        f"--data {files} --n 3 --max-new-tokens 8 --batch-size 4 --device cpu --output {output} "
        + options
    )
    monkeypatch.setattr(sys, "argv", ["evaluate", *shlex.split(arguments)])
    assert evaluate.main() == 0
    return json.loads((output / "evaluation.json").read_text())


def samples(output: Path, model: str, benchmark: str = "sums") -> list[dict[str, Any]]:
    lines = (output / "samples" / model / f"{benchmark}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_two_models_on_two_benchmarks(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    models = f"--model student={root}/student {root}/teacher --model same={root}/megatron"
    found = run(monkeypatch, root, tmp_path / "out", models, "sums few")
    table = capsys.readouterr().out
    for word in ("student", "teacher", "same", "sums", "few", "Avg@3", "Best@3", "pass@2"):
        assert word in table
    assert list(found["models"]) == ["student", "teacher", "same"]
    assert found["benchmarks"]["sums"] == {
        "num_problems": 4, "num_rows": 5, "num_repeated": 1, "num_contradicting": 0,
    }  # fmt: skip
    results = found["results"]
    assert results["student"] == results["same"]  # one model in two formats
    assert samples(tmp_path / "out", "student") != samples(tmp_path / "out", "teacher")
    of_student = samples(tmp_path / "out", "student")
    assert [(s["prompt_index"], s["sample_index"]) for s in of_student] == [
        (prompt, sample) for prompt in (0, 1, 2, 4) for sample in range(3)
    ]
    lengths = [s["num_tokens"] for s in of_student]
    assert results["student"]["sums"]["mean_length"] == pytest.approx(sum(lengths) / 12)
    cut = [s for s in of_student if not s["finished"]]
    assert all(s["num_tokens"] == 8 for s in cut)
    assert results["student"]["sums"]["cut_share"] == len(cut) / 12


def test_greedy_responses_are_those_of_transformers(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, root, tmp_path, f"--model {root}/megatron --temperature 0 --n 1")
    tokenizer, model = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(root / "student")
    for sample in samples(tmp_path, "megatron"):
        question = QUESTIONS[sample["prompt_index"]][0]
        ids = tokenizer(f"<user>{question}<eos><assistant>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        assert sample["response"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert sample["num_tokens"] == len(expected)


def test_right_answers_are_counted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an engine that writes the right answer in one of three samples of the first problem."""
    generate = HFEngine.generate

    def answering(self: HFEngine, prompts: Any, sampling: Any) -> Any:
        rollouts = generate(self, prompts, sampling)
        for rollout in rollouts:
            if (rollout.prompt_index, rollout.sample_index) == (0, 1):
                ids = tiny_tokenizer()("Answer: 4/2")["input_ids"]
                object.__setattr__(rollout, "response_ids", tuple(ids))
        return rollouts

    monkeypatch.setattr(HFEngine, "generate", answering)
    found = run(monkeypatch, root, tmp_path, f"--model {root}/student")
    metrics = found["results"]["student"]["sums"]
    assert metrics["avg"]["value"] == pytest.approx(1 / 12)
    assert metrics["best"]["value"] == pytest.approx(1 / 4)
    assert metrics["pass_at"]["2"]["value"] == pytest.approx((2 / 3) / 4)
    (right,) = [s for s in samples(tmp_path, "student") if s["correct"]]
    assert (right["prompt_index"], right["sample_index"], right["answer"]) == (0, 1, "4/2")


class KilledError(Exception):
    pass


@pytest.mark.parametrize("half_a_line", [False, True])
def test_an_interrupted_evaluation_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half_a_line: bool
) -> None:
    model = f"--model {root}/student"
    expected = run(monkeypatch, root, tmp_path / "whole", model)
    whole = tmp_path / "whole" / "samples" / "student" / "sums.jsonl"
    broken = tmp_path / "broken" / "samples" / "student" / "sums.jsonl"
    generate = HFEngine.generate
    calls: list[int] = []

    def stopping(self: HFEngine, prompts: Any, sampling: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KilledError
        return generate(self, prompts, sampling)

    monkeypatch.setattr(HFEngine, "generate", stopping)
    with pytest.raises(KilledError):
        run(monkeypatch, root, tmp_path / "broken", model)
    assert len(broken.read_text().splitlines()) == 6
    if half_a_line:
        with broken.open("a") as file:
            file.write(whole.read_text().splitlines()[6] + '\n{"prompt_index": 2, "samp')
    calls.clear()
    calls.extend([0] * 5)
    assert run(monkeypatch, root, tmp_path / "broken", model) == expected
    assert calls == [0] * 5 + [1, 1]  # two problems were left, one in each batch
    assert broken.read_bytes() == whole.read_bytes()


def test_other_settings_or_another_model_are_not_mixed_in(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, root, tmp_path, f"--model m={root}/student", "few")
    before = (tmp_path / "samples" / "m" / "few.jsonl").read_bytes()
    for options, message in (
        (f"m={root}/student --temperature 0.5", r"temperature = 0\.7, .* 0\.5"),
        (f"m={root}/student --n 2", "samples_per_prompt = 3, .* 2"),
        (f"m={root}/student --limit 1", "samples with problems = "),
        (f"m={root}/teacher", "samples with weights = "),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, root, tmp_path, f"--model {options}", "few")
    assert (tmp_path / "samples" / "m" / "few.jsonl").read_bytes() == before
    (tmp_path / "samples" / "m" / "few.jsonl").write_text('{"a": 1}\n' * 6)
    with pytest.raises(UserError, match=r"line 1 of .* is not a sample"):
        run(monkeypatch, root, tmp_path, f"--model m={root}/student", "few")
    (tmp_path / "samples" / "m" / "few.settings.json").unlink()
    with pytest.raises(UserError, match=r"few\.settings\.json, .* is missing"):
        run(monkeypatch, root, tmp_path, f"--model m={root}/student", "few")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model {root}/nowhere", "nowhere"),
        ("--model {root}/student x=1 {root}/student", "--model .*'student'"),
        ("--model {root}/student --max-new-tokens 250", "give at most 24"),
        ("--model {root}/student --top-p 1.5", r"--top-p 1\.5"),
        ("--model {root}/student --temperature nan", "--temperature nan"),
        ("--model {root}/student --top-k -1", "--top-k -1"),
        ("--model {root}/student --stop ''", "--stop has an empty text"),
        ("--model {root}/student --teacher {root}/teacher", "--teacher has no effect without"),
        ("--teacher {root}/teacher --student {root}/student", "has no effect without --model"),
    ],
)
def test_mistakes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(monkeypatch, root, tmp_path / "out", options.format(root=root))
    assert not (tmp_path / "out").exists()
