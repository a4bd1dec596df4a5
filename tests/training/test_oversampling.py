"""Runs whose steps start more prompts than they use."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.data.prompts import prompt_indices
from megatron_oprd.errors import UserError
from tests.helpers.pairs import LINEAR_UPDATES, config_of, save_pair
from tests.helpers.ranks import run_ranks

# Four of six prompts are used. About one token in eight ends a response.
OVERSAMPLED = [
    *("rollout.oversample=0.5", "rollout.oversample_interval=2", "rollout.max_new_tokens=16"),
    f"rollout.stop_token_ids={list(range(40, 52))}".replace(" ", ""),
    *("train_iters=6", *LINEAR_UPDATES),
]
NUM_PROMPTS = 30
# A checkpoint after step 3.
KEPT = [*OVERSAMPLED, "rollout.max_staleness=2", "checkpoint.save_interval=4"]
COMPARED = ["rollout.logprob_check_interval=2"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
# Name -> (ranks, settings, folder).
CASES: dict[str, tuple[int, list[str], str]] = {
    "dropped": (1, OVERSAMPLED, "dropped"),
    "dropped_dp2": (2, OVERSAMPLED, "dropped_dp2"),
    "kept": (2, [*KEPT, *COMPARED], "kept"),
    "kept_pp2": (2, [*KEPT, *PP2], "kept_pp2"),
    # Ends after the checkpoint, and goes on.
    "ended": (2, [*KEPT, "train_iters=4", "optimizer.lr_decay_iters=6"], "resumed"),
    "resumed": (2, [*KEPT, "optimizer.lr_decay_iters=6"], "resumed"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("oversampling")
    # A tied tiny model repeats a token to the end, so that all responses are equally long.
    pair = save_pair(root / "pair", "llama")
    # More than all steps start, so that each comes once.
    prompts = [f'{{"prompt": "{number} plus 1"}}\n' for number in range(NUM_PROMPTS)]
    (pair / "prompts.jsonl").write_text("".join(prompts))
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for name, (ranks, overrides, folder) in CASES.items():
        case = {"name": name, "pair": str(pair), "overrides": overrides, "folder": folder}
        cases[ranks].append(case)
    for ranks, of_ranks in cases.items():
        run_ranks("loop", of_ranks, ranks, root)
    return root


def rollouts(root: Path, name: str) -> list[list[Any]]:
    return torch.load(root / f"{name}.pt", weights_only=False)["rollouts"]


def records(root: Path, name: str) -> list[dict[str, Any]]:
    lines = (root / CASES[name][2] / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def stream_of_prompts() -> list[int]:
    """The prompts in the order in which a run without surplus takes them."""
    return prompt_indices(0, num_prompts=NUM_PROMPTS, prompts_per_step=28, seed=RunConfig().seed)


def used(root: Path, name: str) -> list[list[int]]:
    return [[one.prompt_index for one in of_step[::2]] for of_step in rollouts(root, name)]


@pytest.mark.parametrize("name", ["dropped", "kept"])
def test_no_prompt_is_lost(root: Path, name: str) -> None:
    """What waits comes first; of the prompts up to a step all are used but two."""
    steps = used(root, name)
    assert [len(of_step) for of_step in steps] == [4] * 6
    stream = stream_of_prompts()
    waiting: list[int] = []
    for step, of_step in enumerate(steps):
        started = [*waiting, *stream[4 * step + len(waiting) : 4 * step + 6]]
        assert len(started) == 6
        # In the order in which they were started.
        assert of_step == [index for index in started if index in of_step]
        waiting = [index for index in started if index not in of_step]
    assert steps != [stream[4 * step : 4 * step + 4] for step in range(6)]


@pytest.mark.parametrize(("name", "other"), [("dropped_dp2", "dropped"), ("kept_pp2", "kept")])
def test_layout_changes_nothing(root: Path, name: str, other: str) -> None:
    assert rollouts(root, name) == rollouts(root, other)
    for ours, theirs in zip(records(root, name), records(root, other), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for metric in ("stopped", "dropped", "dropped_tokens", "longest_wait"):
            assert ours[f"rollout_{metric}"] == theirs[f"rollout_{metric}"]


def test_a_run_goes_on_as_if_it_had_not_stopped(root: Path) -> None:
    assert rollouts(root, "ended") == rollouts(root, "kept")[:4]
    assert rollouts(root, "resumed") == rollouts(root, "kept")[4:]
    losses = [[one["loss"] for one in records(root, name)] for name in ("resumed", "kept")]
    assert losses[0] == losses[1]


def test_what_is_not_kept_is_made_anew(root: Path) -> None:
    assert {one.weights_version for one in rollouts(root, "dropped")[3]} == {3}
    metrics = records(root, "dropped")
    # Two prompts of two responses, of which all were begun.
    assert [one["rollout_dropped"] for one in metrics] == [4] * 6
    # What is left may be complete as well.
    assert any(one["rollout_stopped"] > 0 for one in metrics)
    assert all(one["rollout_stopped"] <= one["rollout_dropped"] for one in metrics)
    assert all(one["rollout_dropped_tokens"] >= one["rollout_dropped"] for one in metrics)


def test_tokens_are_kept_as_long_as_they_may_be(root: Path) -> None:
    """Nothing goes over a checkpoint, whose tokens a resumed run would not have."""
    metrics = records(root, "kept")
    ages = [one["rollout_staleness"] for one in metrics]
    assert ages[0] == ages[4] == 0
    assert max(ages) in (1, 2)
    assert [one["rollout_dropped"] > 0 for one in metrics][3] is True
    assert metrics[0]["rollout_dropped"] == 0
    # Also of a response whose first tokens are of a step that did not compare.
    stale = [one for of_step in rollouts(root, "kept") for one in of_step]
    assert all(len(one.logprobs) == len(one.response_ids) for one in stale)
    compared = [one for one in metrics if "rollout_logprob_diff_max" in one]
    assert [one["step"] for one in compared] == [0, 2, 4]
    assert compared[0]["rollout_logprob_diff_max"] < 1e-4


def test_fixed_prompts_are_answered_by_the_newest_weights(root: Path) -> None:
    """Whatever the age of the rollouts: these are compared with weights that came later."""
    compared = [one for one in records(root, "kept") if "rollout_logprob_diff_max" in one]
    assert any(one["rollout_staleness"] > 0 for one in compared)
    for one in compared:
        assert one["weight_sync_logprob_diff_max"] < 1e-4
        assert (one["rollout_logprob_diff_max"] < 1e-4) == (one["rollout_staleness"] == 0)


def test_the_longest_wait(root: Path) -> None:
    """Each step that has started a prompt counts."""
    for name in ("dropped", "kept"):
        first: dict[int, int] = {}
        stream = stream_of_prompts()
        done: list[int] = []
        for step, record in enumerate(records(root, name)):
            for index in stream[: 4 * step + 6]:
                first.setdefault(index, step)
            done += used(root, name)[step]
            waits = [step + 1 - first[index] for index in first if index not in done]
            assert record["rollout_longest_wait"] == max(waits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rollout.function=mine:f"], r"oversample = 0.5 cannot .*rollout.function = mine:f"),
        (["data.group_by=domain"], r"oversample = 0.5 cannot .*data.group_by = domain"),
        (["rollout.oversample_interval=16"], r"oversample_interval = 16 is not below .* such as 2"),
        (["rollout.oversample=0"], r"rollout.oversample_interval = 2 .*rollout.oversample"),
    ],
)
def test_settings_that_do_not_go_together(
    tmp_path: Path, settings: list[str], message: str
) -> None:
    pair = save_pair(tmp_path / "pair", "llama")
    with pytest.raises(UserError, match=message):
        config_of(pair, [*OVERSAMPLED, *settings])


@pytest.mark.parametrize(
    ("prompts", "share", "started"), [(8, 0.25, 10), (10, 0.1, 11), (3, 0.1, 4), (8, 0.0, 8)]
)
def test_how_many_prompts_are_started(prompts: int, share: float, started: int) -> None:
    config = RunConfig()
    config.rollout.prompts_per_step, config.rollout.oversample = prompts, share
    assert config.rollout.started_prompts == started
