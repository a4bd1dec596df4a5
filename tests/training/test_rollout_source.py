"""Rollouts ahead of their step: with a stand-in for vLLM in a process of its own, and with hf."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.engine import Rollout, SamplingParams
from megatron_oprd.training import rollout_source
from tests.data.test_benchmarks import row, write
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks

# A checkpoint after step 2, and at the end.
AHEAD = [
    *(
        "rollout.engine=vllm",
        "rollout.max_staleness=1",
        "rollout.vllm.timeout_minutes=0.5",
    ),
    *("train_iters=5", "checkpoint.save_interval=3", "optimizer.lr=0.01"),
]
TP2 = [*AHEAD, "parallel.tensor_model_parallel_size=2"]
# Three steps at once; a checkpoint after step 3.
GROUPED = ["rollout.max_staleness=2", "train_iters=6", "checkpoint.save_interval=4"]
NEVER_AGAIN = ["rollout.vllm.max_restarts=0"]
# Name -> (settings, faults, folder). Of one engine's calls the second is for step 1, begun in step
# 0; the fourth is for step 3, the fifth for step 4.
CASES: dict[str, tuple[list[str], list[str], str]] = {
    # Ends only when the update of step 0 has begun.
    "ahead": (TP2, ["1.generate.2.wait"], "ahead"),
    "stopped": ([*TP2, *NEVER_AGAIN], ["1.generate.4.kill"], "stopped"),
    "resumed": (TP2, [], "stopped"),
    # Stops in step 4, whose rollouts were under way; a checkpoint is written in front of it.
    "lost": ([*TP2, *NEVER_AGAIN], ["1.generate.5.kill"], "lost"),
    "drawn_again": (TP2, [], "lost"),
    "evaluated": (TP2, [], "evaluated"),
    "dp2_fails": (AHEAD, ["1.generate.2.kill"], "dp2_fails"),
    "grouped": ([*GROUPED, "parallel.tensor_model_parallel_size=2"], [], "grouped"),
    "grouped_dp2": (GROUPED, [], "grouped_dp2"),
}


# Runs that only slow tests look at.
NIGHTLY = {"lost", "drawn_again", "evaluated", "dp2_fails", "grouped_dp2"}


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    is_nightly = any(
        item.path == request.path and item.get_closest_marker("slow")
        for item in request.session.items
    )
    root = tmp_path_factory.mktemp("ahead")
    pair = save_pair(root / "pair", "llama", hidden_size=128, intermediate_size=192)
    write(root / "sums.jsonl", [row("1+1", "2")])
    evaluated = [
        *("evaluation.interval=2", f"evaluation.data=[{root}/sums.jsonl]"),
        *("evaluation.n=1", "evaluation.max_new_tokens=6", "rollout.logprob_check_interval=1"),
    ]
    cases = [
        {
            "name": name,
            "pair": str(pair),
            "overrides": [*overrides, *(evaluated if name == "evaluated" else [])],
            "faults": faults,
            "folder": folder,
        }
        for name, (overrides, faults, folder) in CASES.items()
        if is_nightly or name not in NIGHTLY
    ]
    run_ranks("loop", cases, 2, root)
    return root


def rollouts(root: Path, name: str) -> list[list[Any]]:
    return torch.load(root / f"{name}.pt", weights_only=False)["rollouts"]


def records(root: Path, name: str) -> list[dict[str, Any]]:
    lines = (root / CASES[name][2] / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def versions(of_step: list[Any]) -> set[int]:
    return {rollout.weights_version for rollout in of_step}


def test_one_step_ahead_and_none_past_a_checkpoint(root: Path) -> None:
    """An engine that did not work during the update would hang, and be started again."""
    found = rollouts(root, "ahead")
    assert [versions(of_step) for of_step in found] == [{0}, {0}, {1}, {3}, {3}]
    assert [one["rollout_staleness"] for one in records(root, "ahead")] == [0, 1, 1, 0, 1]
    assert [one["rollout_engine_restarts"] for one in records(root, "ahead")] == [0] * 5
    assert len({of_step[0].response_ids for of_step in found}) == 5


@pytest.mark.slow
def test_prompts_are_those_of_their_step(root: Path) -> None:
    found, other = rollouts(root, "ahead"), rollouts(root, "dp2_fails")
    prompts = [[one.prompt_index for one in of_step] for of_step in found]
    assert prompts == [[one.prompt_index for one in of_step] for of_step in other]
    # An epoch of sixteen prompts takes four steps.
    assert sorted({index for of_step in prompts[:4] for index in of_step}) == list(range(16))


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(root: Path) -> None:
    assert (
        "newest checkpoint is of step 3"
        in torch.load(root / "stopped.pt", weights_only=False)["stopped"]
    )
    assert rollouts(root, "resumed") == rollouts(root, "ahead")[3:]
    losses = [one["loss"] for one in records(root, "resumed")]
    assert losses == [one["loss"] for one in records(root, "ahead")]


@pytest.mark.slow
def test_what_was_under_way_is_drawn_again(root: Path) -> None:
    """From another checkpoint, with the weights that it has."""
    assert (
        "newest checkpoint is of step 4"
        in torch.load(root / "lost.pt", weights_only=False)["stopped"]
    )
    (of_step,) = rollouts(root, "drawn_again")
    assert versions(of_step) == {4}
    expected = rollouts(root, "ahead")[4]
    assert [one.prompt_ids for one in of_step] == [one.prompt_ids for one in expected]
    assert [one["rollout_staleness"] for one in records(root, "drawn_again")] == [0, 1, 1, 0, 0]


@pytest.mark.slow
def test_an_evaluation_takes_nothing_from_what_is_under_way(root: Path) -> None:
    assert rollouts(root, "evaluated") == rollouts(root, "ahead")
    steps = [path.name for path in sorted((root / "evaluated" / "evaluation").iterdir())]
    assert steps == ["step_2", "step_4", "step_5"]


@pytest.mark.slow
def test_a_large_difference_of_log_probabilities_is_explained(root: Path) -> None:
    """The stand-in's are all -1."""
    warnings = torch.load(root / "evaluated.pt", weights_only=False)["warnings"]
    differ = [one for one in warnings if "log-probabilities differ" in one]
    assert ["max_staleness" in one for one in differ] == [False, True, True, False, True]


@pytest.mark.slow
def test_an_engine_that_is_lost_on_the_way_repeats_with_its_new_weights(root: Path) -> None:
    """The other replica's rollouts stay."""
    found, expected = rollouts(root, "dp2_fails"), rollouts(root, "ahead")
    assert found[0] == expected[0]
    assert versions(found[1]) == {0, 1}
    kept = [one for one in found[1] if one.weights_version == 0]
    assert len(kept) == 4
    assert all(one in expected[1] for one in kept)
    assert [one["rollout_engine_restarts"] for one in records(root, "dp2_fails")] == [0, 1, 0, 0, 0]
    assert [one["rollout_staleness"] for one in records(root, "dp2_fails")] == [0, 1, 1, 0, 1]


def test_an_engine_in_the_trainers_process_generates_for_several_steps_at_once(root: Path) -> None:
    """Not past a checkpoint; the layout changes nothing; weights are sent for each group."""
    found = rollouts(root, "grouped")
    assert [versions(of_step) for of_step in found] == [{0}, {0}, {0}, {3}, {4}, {4}]
    assert [[one.prompt_index for one in of_step] for of_step in found[:3]] != [
        [one.prompt_index for one in found[0]]
    ] * 3
    metrics = records(root, "grouped")
    assert [one["rollout_staleness"] for one in metrics] == [0, 1, 2, 0, 0, 1]
    assert metrics[2]["rollout_staleness_counts"] == {"2": 8}
    assert [one["weight_sync_gb"] > 0 for one in metrics] == [True, False, False, True, True, False]


def test_several_steps_are_one_call_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With each step's own seed, and log-probabilities for the steps that compare them."""
    calls: list[list[int | None]] = []

    def collect(
        engines: Any, prompts: Sequence[Prompt], sampling: SamplingParams, **_: Any
    ) -> list[Rollout]:
        assert sampling.logprobs
        calls.append([prompt.seed for prompt in prompts])
        return [
            Rollout(
                prompt_index=prompt.index,
                sample_index=sample,
                prompt_ids=prompt.token_ids,
                response_ids=(5,),
                finished=True,
                weights_version=0,
                logprobs=(-1.0,),
            )
            for prompt in prompts
            for sample in range(sampling.samples_per_prompt)
        ]

    def prompts_of(step: int, *_: Any) -> list[Prompt]:
        return [Prompt(index=10 * step + i, token_ids=(1,)) for i in range(2)]

    monkeypatch.setattr(rollout_source, "collect", collect)
    monkeypatch.setattr(rollout_source, "sent_prompts_of_step", prompts_of)
    monkeypatch.setattr(rollout_source, "sent_first_prompts", lambda *_: prompts_of(0))
    config = RunConfig(train_iters=3, seed=7)
    config.rollout.max_staleness = 2
    config.rollout.samples_per_prompt = 3
    config.rollout.logprob_check_interval = 3
    plan: Any = SimpleNamespace(
        config=config, teachers=[SimpleNamespace(reader=None)], function=None
    )
    source = rollout_source.RolloutSource(plan, MagicMock(), MagicMock(), [])
    found = [source.of_step(step).rollouts for step in range(3)]
    # The check's prompts, then all steps'.
    assert calls == [[None] * 2, [7, 7, 8, 8, 9, 9]]
    for step, of_step in enumerate(found):
        expected = [(10 * step + i, sample) for i in range(2) for sample in range(3)]
        assert [(one.prompt_index, one.sample_index) for one in of_step] == expected
        assert [one.logprobs is None for one in of_step] == [step > 0] * 6


@pytest.mark.slow
def test_the_layout_changes_nothing_of_several_steps_rollouts(root: Path) -> None:
    assert rollouts(root, "grouped_dp2")[:3] == rollouts(root, "grouped")[:3]
