"""Several teachers: their losses add up, and each prompt has the teachers it should have."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oprd.config.schema import RideConfig, TeacherConfig
from megatron_oprd.errors import UserError
from megatron_oprd.rollout.engine import Rollout
from megatron_oprd.training.describe import describe
from megatron_oprd.training.plan import RunPlan, make_plan
from megatron_oprd.training.prompts import load_run_prompts, prompts_of_step, taught_by
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
        {"name": "one_offloaded", "overrides": [both[0].replace("}", ", offload: cpu}")]},
        {"name": "ride", "overrides": [f"ride.base={other}", "ride.lambda=1.5"]},
        {"name": "base", "overrides": [f"model.teacher={other}"]},
        {"name": "first_even", "overrides": [], "taught_by": [EVEN]},
        {"name": "second_odd", "overrides": alone, "taught_by": [ODD]},
        {"name": "shared", "overrides": both, "taught_by": [EVEN, ODD]},
    ]
    # Each of the smaller ones alone, so that sequence means count the taught ones only.
    mean = "loss.aggregation=sequence_mean"
    cases += [
        {**case, "name": f"{case['name']}_mean", "overrides": [*case["overrides"], mean]}
        for case in cases[7:]
    ]
    run_ranks("step", [{"pair": str(pair), **case} for case in cases], 1, root)
    return root


@pytest.mark.parametrize(
    ("both", "first", "second"),
    [
        ("both", "first", "second"),
        ("both_offloaded", "first", "second"),
        ("one_offloaded", "first", "second"),
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


def test_ride_goes_past_the_teacher(results: Path) -> None:
    found, teacher, base = (
        torch.load(results / f"{name}.pt") for name in ("ride", "first", "base")
    )
    assert_close_relative(found["loss"], teacher["loss"], 1e-5)
    (extra,) = found["extra_teachers"]
    assert_close_relative(extra[0], base["loss"], 1e-5)
    for name, gradient in found["gradients"].items():
        expected = 1.5 * teacher["gradients"][name] - 0.5 * base["gradients"][name]
        assert_close_relative(gradient, expected, 2e-5, what=name)


def test_rides_two_teachers_are_one_target() -> None:
    """The gradient of the distance to t + (lambda - 1) (t - b), by autograd in fp64."""
    generator = torch.Generator().manual_seed(0)
    state, teacher, base = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    state.requires_grad_()
    for strength in (0.3, 1.0, 2.5):
        target = teacher + (strength - 1) * (teacher - base)
        (expected,) = torch.autograd.grad((state - target).square().mean(), state)
        of_each = (
            strength * (state - teacher).square() - (strength - 1) * (state - base).square()
        ).mean()
        (found,) = torch.autograd.grad(of_each, state)
        assert_close_relative(found, expected, 1e-12)


def test_ride_is_a_name_for_a_teacher(results: Path) -> None:
    base = results / "other" / "teacher"
    config = config_of(
        results / "pair",
        [f"ride.base={base}", "ride.lambda=1.5", "loss.coefficient=2", "taps.layers=[0,2]"],
    )
    assert config.loss.coefficient == 3
    assert config.ride == RideConfig()
    (extra,) = config.extra_teachers
    assert (extra.model, extra.layers, extra.coefficient) == (str(base), [0, 2], -1)


def test_shares_are_of_different_prompts(results: Path) -> None:
    whole, even = (torch.load(results / f"{name}.pt")["loss"] for name in ("first", "first_even"))
    assert not torch.allclose(whole, even, rtol=1e-3)


def shares(*values: float | None) -> list[TeacherConfig]:
    return [TeacherConfig(prompt_share=value) for value in values]


def rollouts(count: int) -> list[Rollout]:
    return [
        Rollout(
            prompt_index=i // 2, sample_index=i % 2, prompt_ids=(5,), response_ids=(6,),
            finished=True,
        )
        for i in range(count)
    ]  # fmt: skip


def test_prompts_are_shared_out() -> None:
    found = taught_by(rollouts(4000), shares(0.25, None, 0.75), seed=1)
    first, all_, last = zip(*(one.taught_by or () for one in found), strict=True)
    assert all(all_)
    assert [a != b for a, b in zip(first, last, strict=True)] == [True] * 4000
    assert first[::2] == first[1::2], "all responses to a prompt have one teacher"
    assert 0.22 < sum(first) / 4000 < 0.28
    assert found == taught_by(rollouts(4000), shares(0.25, None, 0.75), seed=1)
    assert found != taught_by(rollouts(4000), shares(0.25, None, 0.75), seed=2)
    assert taught_by(rollouts(4), shares(None, None), seed=1) == rollouts(4)


def test_a_teacher_of_certain_columns() -> None:
    of_columns = [
        dataclasses.replace(
            one, columns=(("source", "math" if i % 3 else "code"), ("level", i % 3))
        )
        for i, one in enumerate(rollouts(6))
    ]
    teachers = [
        TeacherConfig(when={"source": "math"}),
        TeacherConfig(when={"source": ["code", "chat"]}),
        TeacherConfig(when={"source": "math", "level": [2]}),
        TeacherConfig(),
    ]
    found = taught_by(of_columns, teachers, seed=1)
    assert [one.taught_by for one in found[:3]] == [
        (False, True, False, True), (True, False, False, True), (True, False, True, True),
    ]  # fmt: skip
    assert found[3:] == [
        dataclasses.replace(one, taught_by=found[i].taught_by)
        for i, one in enumerate(of_columns[3:])
    ]


@pytest.fixture
def columns(results: Path, tmp_path: Path) -> Path:
    """A prompt file with a column: 6 prompts of x, 3 of y."""
    lines = [{"prompt": "a b", "source": {"name": "y" if i % 3 == 0 else "x"}} for i in range(9)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def test_the_columns_of_a_prompt_file(results: Path, columns: Path) -> None:
    other = results / "other" / "teacher"
    extra = f"extra_teachers=[{{model: {other}, when: {{source.name: y}}}}]"
    found = plan(results, f"data.prompts=[{columns}]", extra, "data.group_by=source.name")
    prompts = load_run_prompts(found)
    assert [dict(one.columns) for one in prompts[:2]] == [
        {"source.name": "y"},
        {"source.name": "x"},
    ]
    assert "extra teacher 1 teaches the prompts with source.name = y" in describe(found)
    steps = [prompts_of_step(step, prompts, found.config) for step in range(6)]
    names = [{value for one in prompts for _, value in one.columns} for prompts in steps]
    assert sorted(map(sorted, names)) == [["x"]] * 4 + [["y"]] * 2


def test_columns_that_do_not_fit(
    results: Path, columns: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = results / "other" / "teacher"
    prompts = f"data.prompts=[{columns}]"

    def extra(when: str) -> str:
        return f"extra_teachers=[{{model: {other}, when: {when}}}]"

    found = plan(results, prompts, extra("{source.name: z}"))
    with pytest.raises(UserError, match=r"extra_teachers\[0\]\.when = .*source\.name has x, y"):
        load_run_prompts(found)
    with pytest.raises(UserError, match="topic"):
        plan(results, prompts, extra("{topic: z}"))
    load_run_prompts(
        plan(results, prompts, "teacher.when={source.name: x}", extra("{source.name: x}"))
    )
    assert "3 of 9 prompts have no teacher" in caplog.text


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
            r"\[0\.5, 0\.6\].* at most 1",
        ),
        (
            ["extra_teachers=[{model: a, prompt_share: 0.3}]", "teacher.prompt_share=0.5"],
            r"leaves 0\.2 of the prompts",
        ),
        (
            ["extra_teachers=[{model: OTHER, layers: [1], coefficient: -0.5}]"],
            "coefficients of student layer 1 are -0.25 together",
        ),
        (
            ["extra_teachers=[{model: a, coefficient: -1}]", "loss.normalize=l2"],
            r"extra_teachers\[0\]\.coefficient = -1.* needs plain MSE",
        ),
        (
            ["extra_teachers=[{model: a, coefficient: -1, prompt_share: 0.5}]"],
            r"extra_teachers\[0\]\.prompt_share, .* without a minimum",
        ),
        (
            ["extra_teachers=[{model: a, coefficient: -1, bridge: b}]"],
            r"extra_teachers\[0\]\.bridge = b, .* compared directly",
        ),
        (["ride.base=b"], r"no effect with ride\.lambda = 1"),
        (["ride.lambda=2"], r"ride\.lambda = 2\.0 has no effect without ride\.base"),
        (["ride.base=b", "ride.lambda=2", "loss.normalize=l2"], r"set loss\.normalize = none"),
        (["ride.base=b", "ride.lambda=2", "teacher.refresh_interval=1"], "needs a fixed model"),
        (
            ["extra_teachers=[{model: a, when: {c: x}, prompt_share: 0.5}]"],
            r"extra_teachers\[0\]\.when = .* leave one of the two out",
        ),
        (["extra_teachers=[{model: a, when: {c: []}}]"], "column 'c' .* text, a number"),
        (["extra_teachers=[{model: a, weight: 1}]"], r"Key 'weight' not in 'ExtraTeacherConfig'"),
        (["extra_teachers=[{layers: all}]"], r"extra_teachers\[0\]\.model is not set"),
    ],
)
def test_bad_settings(results: Path, overrides: list[str], message: str) -> None:
    other = str(results / "other" / "teacher")
    with pytest.raises(UserError, match=message):
        plan(results, *(override.replace("OTHER", other) for override in overrides))
