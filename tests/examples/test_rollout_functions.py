"""examples/rollout_functions: two steps with tiny models, and the tools by themselves."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oprd.rollout.function import ResponseRequest, Turn
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import ROOT, run_ranks
from tests.helpers.tiny import tiny_tokenizer
from tests.rollout.test_hf import sampling

EXAMPLES = ROOT / "examples" / "rollout_functions"
calculator = importlib.import_module("examples.rollout_functions.calculator")
graded = importlib.import_module("examples.rollout_functions.graded")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("functions")
    pair = save_pair(root / "pair", "llama", max_position_embeddings=512)
    cases = []
    for name in ("calculator", "graded"):
        (root / f"{name}_pair").mkdir()
        (root / f"{name}_pair" / "run.yaml").write_text((EXAMPLES / f"{name}.yaml").read_text())
        cases.append(
            {
                "name": name,
                "pair": str(root / f"{name}_pair"),
                "overrides": [
                    *("train_iters=2", "tensorboard=false", "data.max_prompt_tokens=400"),
                    *(f"model.{one}={pair / one}" for one in ("student", "teacher")),
                    f"data.prompts=[{EXAMPLES / name}.jsonl]",
                ],
            }
        )
    run_ranks("loop", cases, 1, root)
    return root


@pytest.mark.parametrize("name", ["calculator", "graded"])
def test_two_steps(root: Path, name: str) -> None:
    records = [json.loads(x) for x in (root / name / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    metric = {"calculator": "calculator_calls", "graded": "right"}[name]
    assert all(math.isfinite(one["loss"]) and f"function/{metric}" in one for one in records)
    of_steps = torch.load(root / f"{name}.pt", weights_only=False)["rollouts"]
    assert [len(one) for one in of_steps] == [8, 8]


class Script:
    """A `Generate` whose turns are given, as texts for each request."""

    def __init__(self, *turns: list[str]) -> None:
        self.turns = list(turns)
        self.prefixes: list[list[str]] = []

    def __call__(self, requests: Any, prefixes: Any, step: Any) -> list[Turn]:
        assert step.stop == (">>",)
        self.prefixes.append([text(prefix) for prefix in prefixes])
        return [
            Turn(token_ids=ids(one.rstrip("!")), finished=not one.endswith("!"), logprobs=None)
            for one in self.turns.pop(0)
        ]


def ids(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer().encode(text, add_special_tokens=False))


def text(token_ids: Any) -> str:
    return tiny_tokenizer().decode(list(token_ids))


def request(prompt: str, number: int = 0) -> ResponseRequest:
    return ResponseRequest(prompt_index=number, sample_index=0, prompt_ids=ids(prompt), columns={})


def test_the_calculator_answers_and_is_not_supervised() -> None:
    script = Script(["9*3>>", "no idea", "so <<1/0>>"], ["<<27-7>>", "stop"], ["so 20"])
    requests = [request("2 <<", 0), request("3", 1), request("4", 2)]
    found = calculator.roll_out(script, tiny_tokenizer(), requests, sampling(max_new_tokens=60))
    assert script.prefixes[1:] == [["2 <<9*3>> = 27\n", "4so <<1/0>> = error\n"],
                                   ["2 <<9*3>> = 27\n<<27-7>> = 20\n"]]  # fmt: skip
    assert text(found[0].token_ids) == "9*3>> = 27\n<<27-7>> = 20\nso 20"
    own = [
        token for token, is_own in zip(found[0].token_ids, found[0].written, strict=True) if is_own
    ]
    assert text(own) == "9*3>><<27-7>>so 20"
    assert all(found[1].written)
    assert text(found[1].token_ids) == "no idea"
    assert [one.metrics["calculator_calls"] for one in found] == [2, 0, 1]
    assert all(one.finished for one in found)


def test_the_calculator_stops_at_a_full_response_and_at_its_limit() -> None:
    full = Script(["1+1>>"], ["!"])
    (found,) = calculator.roll_out(
        full, tiny_tokenizer(), [request("<<")], sampling(max_new_tokens=len(ids("1+1>> =")))
    )
    assert text(found.token_ids) == "1+1>> ="
    assert not found.finished
    endless = Script(*[["<<1>>"]] * 5)
    (found,) = calculator.roll_out(
        endless, tiny_tokenizer(), [request("1")], sampling(max_new_tokens=99)
    )
    assert found.metrics == {"calculator_calls": 4}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("17 + 26", "43"), ("-(2+3)*4", "-20"), ("7/2", "3.5"), ("1/3", "0.3333333333"),
        ("1/0", "error"), ("9**9", "error"), ("__import__('os')", "error"), ("1 +", "error"),
        ("", "error"), ("'a'*9", "error"), ("True+1", "error"), ("1+" * 60 + "1", "error"),
        ("(" * 49 + "1" + ")" * 49, "1"), ("1e308*1e308", "inf"),
    ],
)  # fmt: skip
def test_arithmetic(expression: str, value: str) -> None:
    assert calculator.calculate(expression) == value


@pytest.mark.parametrize(
    ("response", "answer", "is_right"),
    [
        ("17 plus 26 is 43.", 43, True), ("It is 1,250.", 1250, True), ("-5", -5, True),
        ("43, or 44", 43, False), ("forty-three", 43, False), ("", 43, False),
    ],
)  # fmt: skip
def test_grades(response: str, answer: int, is_right: bool) -> None:
    assert graded.is_right(response, answer) == is_right
