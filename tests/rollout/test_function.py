"""Responses that a function of the user's makes with an engine."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.errors import UserError
from megatron_oprd.rollout.engine import Rollout, SamplingParams
from megatron_oprd.rollout.function import Generate, Response, ResponseRequest, UserFunction
from megatron_oprd.rollout.hf import HFEngine
from tests.helpers.rollout_functions import INSERTED, plain, two_turns
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_tokenizer
from tests.rollout.test_hf import engine_with_weights, sampling

PROMPTS = [
    Prompt(index=index, token_ids=ids, samples=(0, 1))
    for index, ids in [(3, (7, 8, 9, 10, 11, 12)), (0, (20,)), (8, (5, 30, 31))]
]
STEP = sampling(samples_per_prompt=2)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> HFEngine:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, tiny_config("qwen3"), seed=1)
    return engine_with_weights(folder)


def named(function: Callable[..., Any]) -> UserFunction:
    return UserFunction(name="my.module:mine", function=function, tokenizer=tiny_tokenizer())


def test_one_turn_is_what_the_engine_makes(engine: HFEngine) -> None:
    step = replace(STEP, logprobs=True)
    expected = engine.generate(PROMPTS, step)
    found = named(plain).generate(engine, PROMPTS, step)
    assert found == expected
    assert [one.logprobs for one in found] == [one.logprobs for one in expected]


def test_inserted_tokens_and_the_rest_of_the_room(engine: HFEngine) -> None:
    found = named(two_turns).generate(engine, PROMPTS, STEP)
    whole = engine.generate(PROMPTS, STEP)
    assert [(one.prompt_index, one.sample_index) for one in found] == [
        (one.prompt_index, one.sample_index) for one in whole
    ]
    for one, other in zip(found, whole, strict=True):
        first = len(other.response_ids[:3])
        assert one.response_ids[:first] == other.response_ids[:3]
        assert one.response_ids[first : first + 3] == INSERTED
        assert one.written is not None
        assert list(one.written) == [
            not first <= number < first + 3 for number in range(len(one.response_ids))
        ]
        assert one.num_written == len(one.response_ids) - 3
        assert one.metrics == (("first_length", first),)
        assert one.finished or len(one.response_ids) == 12
    assert any(not one.finished for one in found)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_division_over_engines_changes_nothing(engine: HFEngine, temperature: float) -> None:
    step = replace(STEP, temperature=temperature)
    function = named(two_turns)
    together = function.generate(engine, PROMPTS, step)
    apart = [
        rollout
        for prompt in PROMPTS
        for sample in (0, 1)
        for rollout in function.generate(engine, [replace(prompt, samples=(sample,))], step)
    ]
    assert apart == together


def test_every_turn_has_noise_of_its_own(engine: HFEngine) -> None:
    def again_and_again(generate: Generate, *args: Any) -> list[Response]:
        (request,) = args[1]
        turns = generate([request] * 3, [request.prompt_ids] * 3)
        turns += generate([request], [request.prompt_ids])
        assert len({turn.token_ids for turn in turns}) == 4
        first = turns[0].token_ids
        return [Response(token_ids=first, written=[True] * len(first), finished=True)]

    step = sampling(temperature=3.0)
    (found,) = named(again_and_again).generate(engine, [Prompt(index=4, token_ids=(9,))], step)
    (expected,) = engine.generate([Prompt(index=4, token_ids=(9,))], step)
    assert found.response_ids == expected.response_ids


def test_what_a_call_may_change_of_the_sampling(engine: HFEngine) -> None:
    """Stop tokens and lengths, but not the seed."""
    (whole,) = engine.generate([Prompt(index=4, token_ids=(9,))], sampling())
    stop = whole.response_ids[2]

    def stopped(generate: Generate, tokenizer: Any, requests: Any, step: Any) -> list[Response]:
        changed = replace(step, stop_token_ids=(stop,), seed=99, samples_per_prompt=7)
        (turn,) = generate(requests, [requests[0].prompt_ids], changed)
        assert turn.finished
        return [
            Response(token_ids=turn.token_ids, written=[True] * len(turn.token_ids), finished=True)
        ]

    (found,) = named(stopped).generate(engine, [Prompt(index=4, token_ids=(9,))], sampling())
    end = whole.response_ids.index(stop) + 1
    assert found.response_ids == whole.response_ids[:end]


def test_a_full_response_gets_nothing_more(engine: HFEngine) -> None:
    def fills(generate: Generate, tokenizer: Any, requests: Any, step: Any) -> list[Response]:
        prompt = list(requests[0].prompt_ids)
        (one,) = generate(requests, [[*prompt, *[6] * 11]])
        (none,) = generate(requests, [[*prompt, *[6] * 12]])
        assert len(one.token_ids) == 1
        assert (none.token_ids, none.finished, none.logprobs) == ((), False, None)
        return [
            Response(
                token_ids=[*[6] * 11, *one.token_ids], written=[False] * 11 + [True], finished=False
            )
        ]

    (found,) = named(fills).generate(engine, [Prompt(index=4, token_ids=(9,))], sampling())
    assert found.num_written == 1


class Echo:
    """An engine that responds with two tokens, of weights that get newer with each call."""

    def __init__(self) -> None:
        self.version = 4

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        self.version += 1
        return [
            Rollout(
                prompt_index=prompt.index,
                sample_index=0,
                prompt_ids=prompt.token_ids,
                response_ids=(8, 9),
                finished=True,
                weights_version=self.version,
            )
            for prompt in prompts
        ]


def test_the_version_is_that_of_the_oldest_weights() -> None:
    echo: Any = Echo()
    prompt = Prompt(index=4, token_ids=(9,), columns=(("answer", "7"),))

    def uses_columns(generate: Generate, tokenizer: Any, requests: Any, step: Any) -> Any:
        assert requests[0].columns == {"answer": "7"}
        return two_turns(generate, tokenizer, requests, step)

    (found,) = named(uses_columns).generate(echo, [prompt], sampling())
    assert echo.version == 6
    assert found.weights_version == 5


def responds(**fields: Any) -> Callable[..., Any]:
    """A function that asks once and returns a response of these fields."""

    def function(generate: Generate, tokenizer: Any, requests: Any, step: Any) -> list[Response]:
        generate(requests, [one.prompt_ids for one in requests])
        defaults: dict[str, Any] = {"token_ids": [8, 9], "written": [True, True], "finished": True}
        return [Response(**(defaults | fields)) for _ in requests]

    return function


def asks(requests: Any, prefixes: Any) -> Callable[..., Any]:
    return lambda generate, tokenizer, given, step: generate(
        given if requests is None else requests, prefixes
    )


def divides(*_: Any) -> Any:
    return 1 / 0


STRANGER = ResponseRequest(prompt_index=4, sample_index=0, prompt_ids=(9,), columns={})
BAD: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (divides, "failed with ZeroDivisionError: division by zero"),
    "nothing": (lambda *_: None, "returned a NoneType for 1 requests; return a list"),
    "too few": (lambda *_: [], "returned 0 entries for 1 requests; return a list"),
    "never asks": (lambda *_: [STRANGER], "did not call generate"),
    "no response": (
        lambda generate, _, requests, step: generate(requests, [(9,)]),
        "returned a Turn for prompt 4, sample 0; return a megatron_oprd.rollout.function.Response",
    ),
    "long mask": (responds(written=[True] * 3), "returned 2 token_ids and 3 entries of written"),
    "too long": (
        responds(token_ids=[8] * 13, written=[True] * 13),
        "returned 13 tokens for prompt 4, sample 0, more than rollout.max_new_tokens = 12",
    ),
    "nothing written": (responds(written=[False] * 2), "the student wrote nothing, for prompt 4"),
    "empty": (responds(token_ids=[], written=[]), "the student wrote nothing, for prompt 4"),
    "text": (
        responds(token_ids="ab"),
        "gave token_ids for prompt 4, .* that are no integers",
    ),
    "unknown token": (responds(token_ids=[8, 97]), "with the token 97; .* tokens from 0 to 96"),
    "metrics": (
        responds(metrics={"grade": "A"}),
        "returned metrics with 'grade': 'A' for",
    ),
    "no logprobs": (responds(), "returned no logprobs .* rollout.logprob_check_interval needs one"),
    "few logprobs": (responds(logprobs=[-1.0]), "returned 1 logprobs .* student wrote .2."),
    "other numbers": (asks(None, [(9,), (9,)]), "generate.. with 1 requests and 2 prefixes"),
    "other request": (asks([STRANGER], [(9,)]), "a request that is not one of this call's"),
    "empty prefix": (asks(None, [()]), "an empty prefix; give the prompt"),
    "prefix of text": (asks(None, ["ab"]), "gave a prefix that are no integers"),
}


@pytest.mark.parametrize(("function", "message"), BAD.values(), ids=BAD)
def test_mistakes_of_a_function(function: Callable[..., Any], message: str) -> None:
    echo: Any = Echo()
    step = sampling(logprobs="logprobs" in message)
    with pytest.raises(UserError, match=f"rollout.function = my.module:mine .*{message}") as error:
        named(function).generate(echo, [Prompt(index=4, token_ids=(9,))], step)
    assert "\n" not in str(error.value)


def test_an_engine_without_a_share_is_not_asked() -> None:
    echo: Any = Echo()
    assert named(divides).generate(echo, [], sampling()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such.module:f", "cannot be imported .ModuleNotFoundError: No module named 'no'"),
        ("tests.helpers.rollout_functions:f", "cannot be imported .AttributeError"),
        ("tests.helpers.rollout_functions:not_a_function", "is a int, which cannot be called"),
    ],
)
def test_functions_that_cannot_be_used(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"rollout.function = {name} {message}"):
        UserFunction.load(name, tiny_tokenizer())


def test_a_module_with_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_rollouts.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"cannot be imported \(ZeroDivisionError"):
        UserFunction.load("broken_rollouts:f", tiny_tokenizer())
