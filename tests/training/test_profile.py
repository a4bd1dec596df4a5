import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_oprd.config.schema import DataConfig, ModelConfig, ProfileConfig, RunConfig
from megatron_oprd.errors import UserError
from megatron_oprd.phases import phase
from megatron_oprd.training.profile import Profiler, check_profile


@phase("optimizer")
def work(size: int) -> None:
    torch.ones(size, size) @ torch.ones(size, size)


def run(profiler: Profiler, steps: int) -> None:
    for step in range(steps):
        profiler.begin(step)
        work(8 + step)  # steps can be told by their shapes
        with phase(f"of step {step}"):
            work(8 + step)
        profiler.end(step)
    profiler.close()


def names(file: Path) -> list[str]:
    with gzip.open(file) as opened:
        return [event.get("name", "") for event in json.load(opened)["traceEvents"]]


@pytest.mark.parametrize(("steps", "recorded"), [(6, [2, 3]), (3, [2])])
def test_a_trace_has_the_steps_and_their_phases(
    tmp_path: Path, steps: int, recorded: list[int]
) -> None:
    """Also of a run that ends before the profile does."""
    run(Profiler(ProfileConfig(start=2, end=4), tmp_path, rank=0), steps)
    found = names(tmp_path / "profile" / "step_2_rank_0.json.gz")
    assert found.count("optimizer") == 2 * len(recorded)
    assert {name for name in found if name.startswith("of step")} == {
        f"of step {step}" for step in recorded
    }
    assert "aten::mm" in (tmp_path / "profile" / "step_2_rank_0.txt").read_text()


def test_other_ranks_and_runs_record_nothing(tmp_path: Path) -> None:
    run(Profiler(ProfileConfig(start=0, end=2, ranks=[0, 2]), tmp_path, rank=1), 3)
    run(Profiler(ProfileConfig(), tmp_path, rank=0), 3)
    assert list(tmp_path.iterdir()) == []


def config_of(profile: ProfileConfig) -> RunConfig:
    return RunConfig(
        output_dir="run",
        model=ModelConfig(student="s", teacher="t"),
        data=DataConfig(prompts=["p.jsonl"]),
        profile=profile,
    )


def test_what_a_launch_cannot_profile() -> None:
    on_two = config_of(ProfileConfig(start=0, end=1, ranks=[0, 2]))
    with pytest.raises(UserError, match=r"ranks = \[0, 2\] has rank 2, .*from 0 to 1"):
        check_profile(on_two, num_ranks=2, has_gpu=True)
    check_profile(on_two, num_ranks=3, has_gpu=False)
    for kind in ("nsys", "memory"):
        wanted = config_of(ProfileConfig(start=0, end=1, kind=kind))
        with pytest.raises(UserError, match=f"profile.kind = {kind} needs a GPU"):
            check_profile(wanted, num_ranks=2, has_gpu=False)
        check_profile(wanted, num_ranks=2, has_gpu=True)
