from typing import Any

import pytest
import torch

from megatron_oprd.config.schema import Alignment
from megatron_oprd.data.teacher_sequences import TeacherSequence
from megatron_oprd.distill.positions import position_weights, supervise
from tests.helpers.closeness import assert_close_relative

# Three sequences: 2 + 3, 1 + 1 and 3 + 4 tokens. Every weight times 24 is written out.
PROMPTS, RESPONSES = [2, 1, 3], [3, 1, 4]
CASES: dict[str, tuple[dict[str, Any], list[list[float]]]] = {
    "all": (
        {},
        [[0, 0, 3, 3, 3], [0, 3], [0, 0, 0, 3, 3, 3, 3]],
    ),
    "all, predictor": (
        {"alignment": "predictor"},
        [[0, 3, 3, 3, 0], [3, 0], [0, 0, 3, 3, 3, 3, 0]],
    ),
    "all, sequence_mean": (
        {"aggregation": "sequence_mean"},
        [[0, 0, 8 / 3, 8 / 3, 8 / 3], [0, 8], [0, 0, 0, 2, 2, 2, 2]],
    ),
    "last": (
        {"positions": "last"},
        [[0, 0, 0, 0, 8], [0, 8], [0, 0, 0, 0, 0, 0, 8]],
    ),
    "last, predictor": (
        {"positions": "last", "alignment": "predictor"},
        [[0, 0, 0, 8, 0], [8, 0], [0, 0, 0, 0, 0, 8, 0]],
    ),
    "last_k": (
        {"positions": "last_k", "k": 3},
        [[0, 0, 24 / 7, 24 / 7, 24 / 7], [0, 24 / 7], [0, 0, 0, 0, 24 / 7, 24 / 7, 24 / 7]],
    ),
    "first_k, sequence_mean, predictor": (
        {"positions": "first_k", "k": 2, "aggregation": "sequence_mean", "alignment": "predictor"},
        [[0, 4, 4, 0, 0], [8, 0], [0, 0, 4, 4, 0, 0, 0]],
    ),
}


def weights_of(prompts: list[int], responses: list[int], **settings: Any) -> list[torch.Tensor]:
    defaults = {"positions": "all", "k": None, "alignment": "token", "aggregation": "token_mean"}
    return position_weights(prompts, responses, **{**defaults, **settings})


@pytest.mark.parametrize(("settings", "times_24"), CASES.values(), ids=CASES)
def test_weights_written_out(settings: dict[str, Any], times_24: list[list[float]]) -> None:
    found = weights_of(PROMPTS, RESPONSES, **settings)
    assert len(found) == 3
    for weights, expected in zip(found, times_24, strict=True):
        assert weights.dtype == torch.float32
        assert_close_relative(weights, torch.tensor(expected) / 24, 1e-6)
    assert float(torch.cat(found).double().sum()) == pytest.approx(1, abs=1e-6)


def test_the_normaliser_is_the_global_batchs() -> None:
    """A sequence's weights depend on the others: replicas must not normalise their own share."""
    alone = weights_of([2], [3])[0]
    together = weights_of([2, 2], [3, 9])[0]
    assert_close_relative(together, alone * 3 / 12, 1e-6)


@pytest.mark.parametrize(("prompts", "responses"), [([0], [2]), ([2], [0])])
def test_empty_prompts_and_responses_are_our_own_mistake(
    prompts: list[int], responses: list[int]
) -> None:
    with pytest.raises(AssertionError):
        weights_of(prompts, responses)


def test_responses_without_a_counterpart_count_for_nothing() -> None:
    """The mean is over the others: their weights are those that they have without it."""
    for aggregation in ("token_mean", "sequence_mean"):
        has_counterpart = [[True, True], [False] * 3, [True, False]]
        found = weights_of(
            [1, 1, 1], [2, 3, 2], aggregation=aggregation, has_counterpart=has_counterpart
        )
        assert float(torch.cat(found).sum()) == pytest.approx(1, rel=1e-6)
        assert not found[1].any()
        alone = weights_of([1, 1], [2, 1], aggregation=aggregation)
        assert_close_relative(found[0], alone[0], 1e-6)
        assert_close_relative(found[2][:2], alone[1], 1e-6)


# Which tokens of three responses the student wrote; None: all of them.
WRITTEN = [[True, False, False, True, True], None, [False, True, False]]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("alignment", ["token", "predictor"])
@pytest.mark.parametrize(
    ("positions", "k"), [("all", None), ("last", None), ("last_k", 2), ("first_k", 2)]
)
def test_tokens_that_the_student_did_not_write(
    positions: str, k: int | None, alignment: str, aggregation: str
) -> None:
    """They have no weight, and last_k and first_k do not count them."""
    chosen = {
        # Of the tokens 0 3 4, 0 1 and 1.
        ("all", None): [[0, 3, 4], [0, 1], [1]],
        ("last", None): [[4], [1], [1]],
        ("last_k", 2): [[3, 4], [0, 1], [1]],
        ("first_k", 2): [[0, 3], [0, 1], [1]],
    }[positions, k]
    prompts, responses = [2, 1, 3], [5, 2, 3]
    found = weights_of(
        prompts,
        responses,
        positions=positions,
        k=k,
        alignment=alignment,
        aggregation=aggregation,
        written=WRITTEN,
    )
    count = sum(map(len, chosen))
    for weights, prompt, response, tokens in zip(found, prompts, responses, chosen, strict=True):
        expected = torch.zeros(prompt + response)
        for token in tokens:
            # A state is compared if the token after it, or its own token, was written.
            place = prompt + token - (alignment == "predictor")
            expected[place] = 1 / count if aggregation == "token_mean" else 1 / len(tokens) / 3
        assert_close_relative(weights, expected, 1e-6)


@pytest.mark.parametrize("alignment", ["token", "predictor"])
def test_pairs_of_tokens_that_the_student_did_not_write(alignment: Alignment) -> None:
    """A pair of inserted tokens still aligns the predictors of the token after it."""
    other = TeacherSequence(
        prompt_ids=(1, 2, 3, 4), response_ids=(5,) * 6, pairs=((0, 1), (2, 3), (3, 4))
    )
    found = supervise(
        [2],
        [5],
        [other],
        positions="all",
        k=None,
        alignment=alignment,
        aggregation="token_mean",
        written=[[True, False, False, True, True]],
    )
    assert found.positions is not None
    expected = {
        # Written tokens 0 and 3 with a counterpart; 4 has none.
        "token": {2 + 0: 4 + 1, 2 + 3: 4 + 4},
        # The states before tokens 0, 3 and 4, at the ends of the prompt and of tokens 2 and 3.
        "predictor": {1: 3, 2 + 2: 4 + 3, 2 + 3: 4 + 4},
    }[alignment]
    assert found.positions[0].tolist() == [expected.get(place, -1) for place in range(7)]
    assert found.weights[0].nonzero().flatten().tolist() == sorted(expected)
