"""Answers that are found and compared, or are not."""

import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_oprd.evaluation.grading import MAX_ANSWER_CHARACTERS, Grade, Grader, extract_answer
from megatron_oprd.evaluation.grading_worker import equal

MATH_500 = Path(__file__).resolve().parents[3] / "shared" / "data" / "math-500.parquet"


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout=30) as one:
        yield one


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so it is $\boxed{42}$.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{ \frac{{2}}{3} \right\}} done", r"\left\{ \frac{{2}}{3} \right\}"),
        (r"\boxed{1} but no, \boxed{2}", "2"),
        (r"\boxed{7} and then \boxed{8", "7"),
        (r"\fbox{1} \boxed 5.", "5"),
        (r"\boxed{} first, \boxed{3}, \boxed{}", "3"),
        ("Answer: 42", "42"),
        ("Answer: $Answer\nThe work.\n**Answer:** $\\frac{3}{4}$.", r"\frac{3}{4}"),
        ("Final answer:\n\\(x^2\\)\nbye", "x^2"),
        (r"Answer: \boxed{9}", "9"),
        (r"\boxed{5} ... wait. Answer: 6", "6"),
        ("Answer: $1$ or $2$", "$1$ or $2$"),
        ("the value is 42", None),
        ("Answer:", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_last_box_or_answer_line_is_the_answer(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("0.5", r"\boxed{\frac{1}{2}}"),
        ("1/2", r"\dfrac12"),
        ("142", "142.0"),
        ("1,234", "1234"),
        (r"50\%", "0.5"),
        (r"5\text{ cm}", "5"),
        (r"90^\circ", "90"),
        ("x=5", "5"),
        ("[0, 1)", r"\left[0,1\right)"),
        ("2, 1", "1,2"),
        ("Evelyn", r"\text{Evelyn}"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("(x+1)^2", "x^2+2x+1"),
    ],
)
def test_right_answers_in_other_words(grader: Grader, answer: str, gold: str) -> None:
    expected = Grade(answer=answer, correct=True, timed_out=False)
    assert grader.grade(rf"Thus \boxed{{{answer}}}.", gold) == expected


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("2", "-2"),
        ("(0,1)", "[0,1]"),
        ("0.333", r"\frac{1}{3}"),
        (r"\frac{2}{1}", r"\frac{1}{2}"),
        ("x", "y"),
        ("1,2,3", "1,2"),
        (r"\frac{\frac{(}}", "3"),
        ("__import__('os').getcwd()", "3"),
        ("?" * (MAX_ANSWER_CHARACTERS + 1), "3"),
    ],
)
def test_wrong_answers(grader: Grader, answer: str, gold: str) -> None:
    expected = Grade(answer=answer, correct=False, timed_out=False)
    assert grader.grade(rf"\boxed{{{answer}}}", gold) == expected


def test_without_an_answer_nothing_is_right(grader: Grader) -> None:
    expected = Grade(answer=None, correct=False, timed_out=False)
    assert grader.grade("The numbers are 3 and 4.", "4") == expected


def test_a_comparison_without_an_end_is_given_up() -> None:
    with Grader(timeout=3) as grader:
        assert grader.compare("1", "1.0") == (True, False)
        started = time.monotonic()
        assert grader.compare("9^{9^{9^{9}}}", "3") == (False, True)
        assert time.monotonic() - started < 10
        # What was given up is not tried again, and the next answers have a process again.
        started = time.monotonic()
        assert grader.grade(r"\boxed{9^{9^{9^{9}}}}", "3").timed_out
        assert time.monotonic() - started < 0.5
        assert grader.compare("4.0", "4") == (True, False)


@pytest.mark.skipif(not MATH_500.is_file(), reason="../shared/data is not there")
def test_every_reference_answer_of_math_500_equals_itself(grader: Grader) -> None:
    golds = [row["ground_truth"] for row in pq.read_table(MATH_500)["reward_model"].to_pylist()]
    assert len(golds) == 500
    # math-verify by itself, without the grader's comparison of texts
    assert [gold for gold in golds if not equal(gold, gold)] == []
    assert all(grader.grade(f"Answer: ${gold}$", gold).correct for gold in golds)
    assert all(grader.grade(rf"$\boxed{{{gold}}}$.", gold).correct for gold in golds)
