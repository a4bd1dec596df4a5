"""Killed runs go on where they were: bit for bit in the same layout, up to rounding in another."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.helpers.closeness import assert_close_relative
from tests.helpers.pairs import LINEAR_UPDATES, save_pair
from tests.helpers.ranks import ROOT, StartedRanks, rank_environment

STEPS = 6
SETTINGS = [
    f"train_iters={STEPS}", "checkpoint.save_interval=2", *LINEAR_UPDATES, "rollout.temperature=0",
]  # fmt: skip
LONGER = "optimizer.lr_decay_iters=9"
PP2 = ["parallel.pipeline_model_parallel_size=2"]
BF16_DP2 = ["model.params_dtype=bf16"]


def arguments(pair: Path, out: Path, overrides: list[str]) -> list[str]:
    """The command line of a run, without the program."""
    return ["--config", str(pair / "run.yaml"), f"output_dir={out}", *SETTINGS, *overrides]


def start(pair: Path, out: Path, overrides: list[str]) -> StartedRanks:
    """Starts a run on two processes."""
    case = {"program": "megatron_oprd.train", "arguments": arguments(pair, out, overrides)}
    return StartedRanks("entry_point", [case], 2, out.with_suffix(".ranks"))


def finish(pair: Path, out: Path, overrides: list[str]) -> None:
    """Runs to the end."""
    with start(pair, out, overrides) as ranks:
        ranks.finish()


def finish_under_torchrun(pair: Path, out: Path, overrides: list[str]) -> None:
    """Runs to the end on two processes of torchrun's."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "megatron_oprd.train"),
            *arguments(pair, out, overrides),
        ],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def wait_until(condition: Callable[[], bool], still_runs: Callable[[], bool]) -> None:
    """Returns when the condition holds, for a run that has to be killed then."""
    end = time.monotonic() + 300
    while not condition():
        assert still_runs(), "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.002)


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The exported student."""
    student = HFCheckpoint(out / "student")
    return {name: student.read(name) for name in student.names()}


def records(out: Path) -> list[dict]:
    """The logged steps."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def checkpoint_names(out: Path) -> list[str]:
    """What is in the folder of checkpoints."""
    folder = out / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def assert_equal_runs(found: Path, expected: Path) -> None:
    """Both runs logged the same losses and exported the same bits."""
    assert [r["step"] for r in records(found)] == list(range(STEPS))
    assert [r["loss"] for r in records(found)] == [r["loss"] for r in records(expected)]
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("resume") / "pair", "llama", teacher_layers=7)


@pytest.mark.slow
def test_killed_between_checkpoints(pair: Path, tmp_path: Path) -> None:
    """bf16 weights, fp32 main parameters, the distributed optimizer over two replicas.

    The run that goes on is torchrun's.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(pair, whole, BF16_DP2)

    def after_step_2() -> bool:
        metrics = killed / "metrics.jsonl"
        return metrics.exists() and '"step": 2' in metrics.read_text()

    with start(pair, killed, BF16_DP2) as ranks:
        wait_until(after_step_2, ranks.poll)
        ranks.kill()
    assert checkpoint_names(killed)[0] == "step_0000002"
    assert not (killed / "student").exists()
    finish_under_torchrun(pair, killed, BF16_DP2)
    assert_equal_runs(killed, whole)
    before = HFCheckpoint(pair / "student")
    moved = [not torch.equal(t, before.read(name).bfloat16()) for name, t in weights(whole).items()]
    assert sum(moved) > len(moved) / 2, "the run has to change weights for this to mean anything"


def test_killed_while_writing(pair: Path, tmp_path: Path) -> None:
    whole, killed, other = tmp_path / "whole", tmp_path / "killed", tmp_path / "other_layout"
    finish(pair, whole, PP2)
    assert checkpoint_names(whole) == ["step_0000004", "step_0000006"], "the newest two are kept"

    unfinished = killed / "checkpoints" / ".step_0000004.tmp"
    with start(pair, killed, PP2) as ranks:
        wait_until(unfinished.is_dir, ranks.poll)
        ranks.kill()
    assert checkpoint_names(killed) == [".step_0000004.tmp", "step_0000002"]
    shutil.copytree(killed, other)

    finish(pair, killed, PP2)
    assert_equal_runs(killed, whole)
    assert checkpoint_names(killed) == ["step_0000004", "step_0000006"]

    finish(pair, other, ["parallel.tensor_model_parallel_size=2"])
    expected = weights(whole)
    for name, tensor in weights(other).items():
        assert_close_relative(tensor, expected[name], 1e-4, what=name)


@pytest.mark.slow
def test_finished_run_starts_again_and_changes_nothing(pair: Path, tmp_path: Path) -> None:
    """A run that is at its end only exports again; with more steps it goes on."""
    out = tmp_path / "run"
    finish(pair, out, [*PP2, LONGER, "train_iters=2"])
    first = weights(out)
    finish(pair, out, [*PP2, LONGER, "train_iters=2"])
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(out).items())
    finish(pair, out, [*PP2, LONGER, "train_iters=3"])
    assert [r["step"] for r in records(out)] == [0, 1, 2]
    assert not all(torch.equal(tensor, first[name]) for name, tensor in weights(out).items())
