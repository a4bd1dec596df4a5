"""Runs whose rollouts come from a function of the user's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oprd.errors import UserError
from megatron_oprd.training.checkpoints import read_manifest
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.prompts import load_run_prompts
from tests.data.test_benchmarks import row, write
from tests.helpers.pairs import LINEAR_UPDATES, config_of, save_pair
from tests.helpers.ranks import run_ranks
from tests.helpers.rollout_functions import INSERTED

FUNCTION = "rollout.function=tests.helpers.rollout_functions:"
TWO_STEPS = ["train_iters=2", *LINEAR_UPDATES]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
COMPARED = ["rollout.logprob_check_interval=1"]
# Name -> (ranks, settings).
CASES: dict[str, tuple[int, list[str]]] = {
    "no_function": (1, TWO_STEPS),
    "plain": (1, [*TWO_STEPS, FUNCTION + "plain"]),
    "two_turns": (1, [*TWO_STEPS, *COMPARED, FUNCTION + "two_turns"]),
    "small_batches": (1, [*TWO_STEPS, FUNCTION + "two_turns", "rollout.max_batch_size=3"]),
    "pp2": (2, [*TWO_STEPS, *COMPARED, *PP2, FUNCTION + "two_turns"]),
    "dp2": (2, [*TWO_STEPS, FUNCTION + "two_turns"]),
    # hf generates the rollouts of both steps in the first one.
    "stale": (2, [*TWO_STEPS, FUNCTION + "two_turns", "rollout.max_staleness=1"]),
    "fails": (2, [*TWO_STEPS, FUNCTION + "fails_on_one_prompt", "data.shuffle=false"]),
    "fails_later": (2, [*TWO_STEPS, FUNCTION + "fails_in_the_second_step", "data.shuffle=false"]),
    "evaluated": (1, ["train_iters=1", "optimizer.lr=0", FUNCTION + "two_turns"]),
    "evaluated_without": (1, ["train_iters=1", "optimizer.lr=0"]),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("function")
    pair = save_pair(root / "pair", "llama", tied=True)
    write(root / "sums.jsonl", [row("1+1", "2"), row("2*3", "6")])
    evaluation = [
        "evaluation.interval=1", f"evaluation.data=[{root}/sums.jsonl]", "evaluation.n=2",
        "evaluation.max_new_tokens=6",
    ]  # fmt: skip
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for name, (ranks, overrides) in CASES.items():
        overrides = [*overrides, *(evaluation if name.startswith("evaluated") else [])]
        cases[ranks].append({"name": name, "pair": str(pair), "overrides": overrides})
    for ranks, of_ranks in cases.items():
        run_ranks("loop", of_ranks, ranks, root)
    return root


def found(root: Path, name: str) -> dict[str, Any]:
    return torch.load(root / f"{name}.pt", weights_only=False)


def records(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (root / name / "metrics.jsonl").read_text().splitlines()]


def test_one_turn_trains_as_the_engine_alone(root: Path) -> None:
    assert found(root, "plain")["rollouts"] == found(root, "no_function")["rollouts"]
    losses = [[one["loss"] for one in records(root, name)] for name in ("plain", "no_function")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["small_batches", "pp2", "dp2"])
def test_layout_changes_no_rollout(root: Path, name: str) -> None:
    expected = found(root, "two_turns")["rollouts"]
    assert len(expected) == 2
    assert all(one.response_ids[3:6] == INSERTED for one in expected[0] if one.written[2])
    assert found(root, name)["rollouts"] == expected
    for ours, theirs in zip(records(root, name), records(root, "two_turns"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_metrics_count_what_the_student_wrote(root: Path) -> None:
    for of_step, record in zip(
        found(root, "two_turns")["rollouts"], records(root, "two_turns"), strict=True
    ):
        written = [sum(one.written) for one in of_step]
        assert all(len(one.response_ids) == n + 3 for one, n in zip(of_step, written, strict=True))
        assert record["response_length_mean"] == sum(written) / len(written)
        assert record["response_length_max"] == max(written)
        assert record["num_tokens"] == sum(
            len(one.prompt_ids) + len(one.response_ids) for one in of_step
        )
        first = [dict(one.metrics)["first_length"] for one in of_step]
        assert record["function/first_length"] == sum(first) / len(first)
        assert record["finished_share"] == sum(one.finished for one in of_step) / len(of_step)


@pytest.mark.parametrize("name", ["two_turns", "pp2"])
def test_log_probabilities_of_written_tokens_are_compared(root: Path, name: str) -> None:
    for of_step, record in zip(found(root, name)["rollouts"], records(root, name), strict=True):
        assert all(len(one.logprobs) == one.num_written for one in of_step)
        # Of logits of about 1; inserted tokens would make a difference of the same size.
        assert 0 < record["rollout_logprob_diff_max"] < 1e-4


def test_a_step_ahead_with_an_engine_in_the_trainer(root: Path) -> None:
    ahead, expected = found(root, "stale")["rollouts"], found(root, "two_turns")["rollouts"]
    assert ahead[0] == expected[0]
    assert {one.weights_version for one in ahead[1]} == {0}
    assert ahead[1] != expected[1]


def test_a_mistake_on_one_engine_is_told_on_every_rank(root: Path) -> None:
    """The worker compares what the ranks say."""
    assert found(root, "fails")["stopped"] == (
        "rollout.function = tests.helpers.rollout_functions:fails_on_one_prompt failed with "
        "ZeroDivisionError: division by zero; no step was done, so that there is no checkpoint"
    )


def test_what_was_reached_is_saved(root: Path) -> None:
    """In one line, as every mistake of the user's."""
    stopped = found(root, "fails_later")["stopped"]
    assert "failed with ZeroDivisionError" in stopped
    assert "; the newest checkpoint is of step 1, from which the same command goes on" in stopped
    assert "\n" not in stopped
    (checkpoint,) = (root / "fails_later" / "checkpoints").iterdir()
    assert read_manifest(checkpoint)["step"] == 1


def test_evaluations_are_of_the_engine_alone(root: Path) -> None:
    files = [
        root / name / "evaluation" / "step_1" / "sums.jsonl"
        for name in ("evaluated", "evaluated_without")
    ]
    assert files[0].read_text() == files[1].read_text()
    assert found(root, "evaluated")["rollouts"] != found(root, "evaluated_without")["rollouts"]


def test_columns_reach_the_function(tmp_path: Path) -> None:
    pair = save_pair(tmp_path / "pair", "llama")
    (pair / "prompts.jsonl").write_text('{"prompt": "1 plus 2", "answer": 3}\n')
    wanted = [FUNCTION + "plain", "rollout.function_columns=[answer]"]
    plan = make_plan(config_of(pair, wanted), world_size=1)
    assert load_run_prompts(plan)[0].columns == (("answer", 3),)
    (pair / "prompts.jsonl").write_text('{"prompt": "1 plus 2"}\n')
    with pytest.raises(UserError, match=r"rollout.function_columns.*answer|answer.*function_col"):
        make_plan(config_of(pair, wanted), world_size=1)


def test_functions_that_cannot_be_planned(tmp_path: Path) -> None:
    pair = save_pair(tmp_path / "pair", "llama")
    with pytest.raises(UserError, match=r"rollout.function = nothing.here:f cannot be imported"):
        make_plan(config_of(pair, ["rollout.function=nothing.here:f"]), world_size=1)
    with pytest.raises(UserError, match=r"rollout.function = mine is not .*package.module:name"):
        config_of(pair, ["rollout.function=mine"])
    ahead = ["rollout.engine=vllm", "rollout.max_staleness=1", FUNCTION + "plain"]
    with pytest.raises(UserError, match=r"max_staleness = 1 cannot be .*rollout.function = tests"):
        config_of(pair, ahead)
