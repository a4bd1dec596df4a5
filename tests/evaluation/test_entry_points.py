"""evaluate and report as a user starts them, on tiny models."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_oprd import evaluate, report
from megatron_oprd.data.chat import ChatFormat
from megatron_oprd.errors import UserError
from megatron_oprd.evaluation.students import evaluate_students, read_evaluation, write_evaluation
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_tokenizer

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    save_tiny_model(root / "teacher", tiny_config("llama"), seed=1)
    save_tiny_model(root / "short", tiny_config("llama", num_hidden_layers=2), seed=2)
    save_tiny_model(root / "wide", tiny_config("llama", hidden_size=64), seed=3)
    padded = tiny_config("llama", vocab_size=104)
    save_tiny_model(root / "padded", padded, seed=4)
    tiny_tokenizer().save_pretrained(root / "padded")
    questions = ["1+1?", "what is 2*3", "12-7=?"]
    (root / "held.jsonl").write_text(
        "".join(
            json.dumps({"prompt": [{"role": "user", "content": question}]}) + "\n"
            for question in questions
        )
    )
    return root


def run(monkeypatch: pytest.MonkeyPatch, main: Callable[[], int], arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *shlex.split(arguments)])
    assert main() == 0


def test_evaluate_then_report(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    output = tmp_path / "new" / "eval.json"
    run(
        monkeypatch,
        evaluate.main,
        f"--teacher {folders}/teacher --student before={folders}/short {folders}/teacher "
        f"--prompts {folders}/held.jsonl --output {output} "
        "--max-new-tokens 6 --batch-size 2 --device cpu",
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["before", "teacher"]
    assert [cell.strip() for cell in rows[1].split("│")[2:5]] == ["4", "1.0000", "100.0%"]

    evaluation = read_evaluation(output)
    before, after = evaluation.students
    assert (evaluation.num_prompts, evaluation.max_new_tokens) == (3, 6)
    assert (before.num_layers, before.layer_map) == (2, [0, 3])
    assert before.folder == str(folders / "short")
    assert before.measures.num_sequences == 3
    assert 3 <= before.measures.num_positions <= 18
    assert before.measures.cosine is not None
    assert before.measures.cosine < 0.9
    assert abs(after.measures.reverse_kl) <= 1e-6 * before.measures.reverse_kl

    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n')
    picture = tmp_path / "report.png"
    run(monkeypatch, report.main, f"--metrics {metrics} --evaluation {output} --output {picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    (kl_row,) = (line for line in table.splitlines() if "reverse KL" in line)
    assert f"-{before.measures.reverse_kl:.4f} better" in kl_row

    write_evaluation(read_evaluation(output), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == output.read_text()


def test_students_of_another_width(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All but the cosine is measured; the report draws the training's own cosine."""
    monkeypatch.setenv("COLUMNS", "120")
    output = tmp_path / "eval.json"
    run(
        monkeypatch,
        evaluate.main,
        f"--teacher {folders}/teacher --student {folders}/wide {folders}/teacher "
        f"--prompts {folders}/held.jsonl --output {output} --max-new-tokens 6 --device cpu",
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [cell.strip() for cell in rows[0].split("│")[1:4]] == ["wide", "4", "-"]
    wide, same = read_evaluation(output).students
    assert (wide.num_layers, wide.layer_map, wide.measures.cosine) == (4, [], None)
    assert wide.measures.reverse_kl > 0.1
    assert same.measures.cosine == pytest.approx(1, rel=1e-5)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 0.5, "cosine_per_layer": {"0": 0.5}}\n')
    run(
        monkeypatch, report.main, f"--metrics {metrics} --evaluation {output} --output {output}.png"
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [cell.strip() for cell in rows[0].split("│")[1:5]] == ["mean cosine", "-", "1.0000", "-"]


def test_changes_for_the_worse_are_called_worse(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluation = evaluate_students(
        folders / "teacher",
        {"same": folders / "teacher", "short": folders / "short"},
        [folders / "held.jsonl"],
        max_new_tokens=4,
        max_prompt_tokens=100,
        chat=ChatFormat(),
        batch_size=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    write_evaluation(evaluation, tmp_path / "eval.json")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    run(
        monkeypatch,
        report.main,
        f"--metrics {tmp_path}/metrics.jsonl --evaluation {tmp_path}/eval.json "
        f"--output {tmp_path}/report.png",
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert len(rows) == 5
    assert all(row.rstrip(" │").endswith("worse") for row in rows)


@pytest.mark.parametrize(
    ("students", "message"),
    [
        ("{root}/nowhere", "cannot read .*nowhere/config.json: No such file"),
        ("{root}/padded", "has vocab_size 104, --teacher .* has 97"),
        ("{root}/short short={root}/teacher", "--student .*'short'.* NAME="),
    ],
)
def test_mistakes(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    students: str,
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        run(
            monkeypatch,
            evaluate.main,
            f"--teacher {folders}/teacher --student {students.format(root=folders)} "
            f"--prompts {folders}/held.jsonl --output {tmp_path}/eval.json",
        )
    assert not (tmp_path / "eval.json").exists()


def test_a_folder_may_have_an_equals_sign(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1" / "model").symlink_to(folders / "short")
    run(
        monkeypatch,
        evaluate.main,
        f"--teacher {folders}/teacher --student {tmp_path}/lr=1/model named={tmp_path}/lr=1/model "
        f"--prompts {folders}/held.jsonl --output {tmp_path}/eval.json --max-new-tokens 1",
    )
    students = read_evaluation(tmp_path / "eval.json").students
    assert [student.name for student in students] == ["model", "named"]
    assert {student.folder for student in students} == {f"{tmp_path}/lr=1/model"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"students": [{"name": "a"}]}',
        '{"teacher": "t", "prompts": [], "num_prompts": 0, "max_new_tokens": 1, "students": []}',
    ],
)
def test_another_file_is_not_an_evaluation(tmp_path: Path, text: str) -> None:
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(UserError, match=r"is not a file that megatron_oprd\.evaluate wrote"):
        read_evaluation(tmp_path / "eval.json")
    with pytest.raises(UserError, match="cannot read"):
        read_evaluation(tmp_path / "none.json")
