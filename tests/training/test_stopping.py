"""A run that is asked to stop saves at the end of a step, says so, and goes on later."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_oprd.errors import EXIT_STOPPED
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks

SIGNALS = {"sigterm": signal.SIGTERM, "sigusr1": signal.SIGUSR1}
BY_THE_CLOCK = ["checkpoint.exit_after_minutes=0.0001", "checkpoint.save_interval=null"]
OFTEN = ["checkpoint.save_interval_minutes=0.0001", "checkpoint.save_interval=null"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stopping")
    pair = save_pair(root / "pair", "llama")

    def case(out: str, *overrides: str, **entries: Any) -> dict[str, Any]:
        arguments = ["--config", str(pair / "run.yaml"), f"output_dir={root / out}", *overrides]
        return {"program": "megatron_oprd.train", "arguments": arguments, **entries}

    # The signal comes after saves, whose processes get it, too, if they are still there.
    endless = ["train_iters=100000", "checkpoint.save_interval=1", "checkpoint.keep=1"]
    # Rank 1 alone gets the signal, once two steps are done.
    asked = [
        case(name, *endless, code=EXIT_STOPPED, signal=number, signal_after=str(root / name))
        for name, number in SIGNALS.items()
    ]
    run_ranks("entry_point", asked, 2, root / "ranks.asked")
    clock = [case("clock", "train_iters=2", *BY_THE_CLOCK, code=EXIT_STOPPED)] * 2
    often = case("often", "train_iters=3", "checkpoint.keep=9", *OFTEN)
    run_ranks("entry_point", [*clock, often], 1, root / "ranks.clock")
    return root


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_to_one_rank_stops_all(root: Path, name: str) -> None:
    done = steps(root / name)
    assert len(done) >= 2
    said = (root / "ranks.asked" / "rank_0_of_2.log").read_text()
    assert f"stopped after step {done[-1]}, on {SIGNALS[name].name}" in said
    assert checkpoints(root / name) == [f"step_{len(done):07d}"]
    assert not (root / name / "student").exists()


def test_exit_after_minutes(root: Path) -> None:
    """Twice: after the first step, and after the second, which is the last."""
    assert steps(root / "clock") == [0, 1]
    assert checkpoints(root / "clock") == ["step_0000001", "step_0000002"]
    said = (root / "ranks.clock" / "rank_0_of_1.log").read_text()
    for step in (0, 1):
        assert f"stopped after step {step}, on checkpoint.exit_after_minutes" in said
    assert "the same command goes on" in said
    assert not (root / "clock" / "student").exists()


def test_save_interval_minutes(root: Path) -> None:
    assert checkpoints(root / "often") == [f"step_{n:07d}" for n in (1, 2, 3)]
    assert (root / "often" / "student").is_dir()
