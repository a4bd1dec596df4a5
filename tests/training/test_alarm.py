"""The alarm: the score falls by more than its noise while the cosine rises."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_oprd.training.alarm import CollapseAlarm, Evaluation, collapse, standard_error

BEST = {"step": 9, "eval_score": 0.6, "eval_responses": 800, "cosine": 0.5, "eval/sums": {}}
# Two standard errors of 800 responses each: 2 sqrt(2 * 0.575 * 0.425 / 800) = 0.0494.
FALLEN = {**BEST, "step": 19, "eval_score": 0.55, "cosine": 0.7}


def of(metrics: dict[str, Any], **changes: Any) -> Evaluation:
    found = Evaluation.of({**metrics, **changes})
    assert found is not None
    return found


def test_names_both_steps_numbers_and_what_to_do() -> None:
    text = collapse(of(BEST), of(FALLEN))
    assert text is not None
    for part in ("step 10", "step 20", "0.6", "0.55", "0.5 to 0.7", "2.0 standard errors"):
        assert part in text
    for advice in (
        "taps.layers = last",
        "output_loss.kind",
        "loss.coefficient_points",
        "choosing.md",
    ):
        assert advice in text


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_score": 0.56},  # within two standard errors
        {"eval_score": 0.65},
        {"cosine": 0.5},
        {"cosine": 0.3},
        {"cosine": None},  # nothing was supervised, or there are no taps
    ],
)
def test_silent(changes: dict[str, Any]) -> None:
    assert collapse(of(BEST), of(FALLEN, **changes)) is None


def test_standard_error_is_of_the_difference_and_falls_with_responses() -> None:
    few, many = (of(BEST, eval_score=0.5, eval_responses=number) for number in (50, 5000))
    assert standard_error(few, few) == pytest.approx(0.1)
    assert standard_error(many, many) == pytest.approx(0.01)
    right = of(BEST, eval_score=1.0)
    assert standard_error(right, right) == 0
    assert collapse(right, of(FALLEN, eval_score=1.0)) is None


def test_compares_with_the_best_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alarm = CollapseAlarm(tmp_path / "missing.jsonl")
    assert not alarm.raise_for(BEST)
    assert not alarm.raise_for({**FALLEN, "eval_score": 0.56})
    assert capsys.readouterr().err == ""
    # From the last evaluation it has fallen by 0.02 only.
    assert alarm.raise_for({**FALLEN, "step": 29, "eval_score": 0.54})
    line = capsys.readouterr().err
    assert line.startswith("warning: after step 30")
    assert line.count("\n") == 1
    assert not alarm.raise_for({**FALLEN, "step": 39, "eval_score": 0.6, "cosine": 0.8})
    # Of equal scores the later one counts: the cosine has not risen since.
    assert not alarm.raise_for({**FALLEN, "step": 49, "eval_score": 0.5, "cosine": 0.75})


def test_goes_on_after_a_resume(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    records = [{"step": 8, "cosine": 0.4}, BEST, {"step": 10, "cosine": 0.6}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert CollapseAlarm(file).raise_for(FALLEN)
    others = {name: value for name, value in FALLEN.items() if name != "eval/sums"}
    for other in ({**FALLEN, "eval_responses": 400}, {**others, "eval/products": {}}):
        alarm = CollapseAlarm(file)
        assert not alarm.raise_for(other)
        assert alarm.raise_for({**other, "eval_score": 0.1, "cosine": 0.9})
