"""Several teachers: their losses add up, and each prompt has the teachers it should have."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oprd.errors import UserError
from megatron_oprd.rollout.engine import Rollout
from megatron_oprd.training.describe import describe
from megatron_oprd.training.plan import RunPlan, make_plan
from megatron_oprd.training.rollouts import taught_by
from tests.helpers.closeness import assert_close_relative
from tests.helpers.pairs import config_of, save_pair
from tests.helpers.ranks import run_ranks

EVEN, ODD = [True, False] * 4, [False, True] * 4
SECOND_TAPS = ["taps.layers=[0,2]", "taps.layer_map=[1,3]", "loss.coefficient=3"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("several")
    pair = save_pair(root / "pair", "llama", teacher_layers=6)
    other = save_pair(root / "other", "qwen3") / "teacher"
    second = f"{{model: {other}, layers: [0, 2], layer_map: [1, 3], coefficient: 3}}"
    both = [f"extra_teachers=[{second}]"]
    alone = [f"model.teacher={other}", *SECOND_TAPS]
    cases: list[dict[str, Any]] = [
        {"name": "first", "overrides": []},
        {"name": "second", "overrides": alone},
        {"name": "both", "overrides": both},
        {"name": "both_offloaded", "overrides": [*both, "teacher.offload=cpu"]},
        {"name": "first_even", "overrides": [], "taught_by": [EVEN]},
        {"name": "second_odd", "overrides": alone, "taught_by": [ODD]},
        {"name": "shared", "overrides": both, "taught_by": [EVEN, ODD]},
    ]
    # Each of the smaller ones alone, so that sequence means count the taught ones only.
    mean = "loss.aggregation=sequence_mean"
    cases += [
        {**case, "name": f"{case['name']}_mean", "overrides": [*case["overrides"], mean]}
        for case in cases[4:]
    ]
    run_ranks("step", [{"pair": str(pair), **case} for case in cases], 1, root)
    return root


@pytest.mark.parametrize(
    ("both", "first", "second"),
    [
        ("both", "first", "second"),
        ("both_offloaded", "first", "second"),
        ("shared", "first_even", "second_odd"),
        ("shared_mean", "first_even_mean", "second_odd_mean"),
    ],
)
def test_losses_add_up(results: Path, both: str, first: str, second: str) -> None:
    found, one, other = (torch.load(results / f"{name}.pt") for name in (both, first, second))
    assert_close_relative(found["loss"], one["loss"], 1e-5)
    (extra,) = found["extra_teachers"]
    assert_close_relative(extra[0], other["loss"], 1e-5)
    assert_close_relative(extra[1], other["cosine"], 1e-6, size=1.0)
    for name, gradient in found["gradients"].items():
        expected = one["gradients"][name] + other["gradients"][name]
        assert_close_relative(gradient, expected, 1e-5, what=name)


def test_shares_are_of_different_prompts(results: Path) -> None:
    whole, even = (torch.load(results / f"{name}.pt")["loss"] for name in ("first", "first_even"))
    assert not torch.allclose(whole, even, rtol=1e-3)


def rollouts(count: int) -> list[Rollout]:
    return [
        Rollout(
            prompt_index=i // 2, sample_index=i % 2, prompt_ids=(5,), response_ids=(6,),
            finished=True,
        )
        for i in range(count)
    ]  # fmt: skip


def test_prompts_are_shared_out() -> None:
    found = taught_by(rollouts(4000), [0.25, None, 0.75], seed=1)
    first, all_, last = zip(*(one.taught_by or () for one in found), strict=True)
    assert all(all_)
    assert [a != b for a, b in zip(first, last, strict=True)] == [True] * 4000
    assert first[::2] == first[1::2], "all responses to a prompt have one teacher"
    assert 0.22 < sum(first) / 4000 < 0.28
    assert found == taught_by(rollouts(4000), [0.25, None, 0.75], seed=1)
    assert found != taught_by(rollouts(4000), [0.25, None, 0.75], seed=2)
    assert taught_by(rollouts(4), [None, None], seed=1) == rollouts(4)


def plan(results: Path, *overrides: str) -> RunPlan:
    return make_plan(config_of(results / "pair", list(overrides)), world_size=1)


def test_the_plan_says_who_teaches_what(results: Path) -> None:
    teacher = results / "other" / "teacher"
    found = plan(results, "taps.layers=[0]", f"extra_teachers=[{{model: {teacher}}}]")
    assert [one.layout.num_running_layers for one in found.teachers] == [4, 4]
    line = f"extra teacher 1, {teacher}: 0 -> 0, 1 -> 1, 2 -> 2, 3 -> 3; layers of each stage: 4"
    assert line in describe(found)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["extra_teachers=[{model: /nowhere}]"],
            r"extra_teachers\[0\], as a teacher alone: .*/nowhere.* does not exist",
        ),
        (["teacher.prompt_share=0.5"], r"teacher\.prompt_share = 0\.5 has no effect without"),
        (
            ["extra_teachers=[{model: a, prompt_share: 0.6}]", "teacher.prompt_share=0.5"],
            r"\[0\.5, 0\.6\]: have to be at most 1 together",
        ),
        (
            ["extra_teachers=[{model: a, prompt_share: 0.3}]", "teacher.prompt_share=0.5"],
            r"leave 0\.2 of the prompts to no teacher",
        ),
        (
            ["extra_teachers=[{model: a, coefficient: -1}]"],
            r"extra_teachers\[0\]\.coefficient = -1",
        ),
        (["extra_teachers=[{model: a, weight: 1}]"], r"Key 'weight' not in 'ExtraTeacherConfig'"),
        (["extra_teachers=[{layers: all}]"], r"extra_teachers\[0\]\.model is not set"),
    ],
)
def test_bad_settings(results: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(results, *overrides)
