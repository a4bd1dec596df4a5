"""The command line, on folders that hold nothing but a config.json."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_oprd import plan
from megatron_oprd.errors import UserError
from megatron_oprd.planning.memory import PHASES
from tests.planning.models import EXAMPLES, model_folder

pytestmark = pytest.mark.long

PIPELINE = "parallel.pipeline_model_parallel_size=2"
CHUNKS = "parallel.virtual_pipeline_model_parallel_size=2"


def command_line(directory: Path, *arguments: str) -> list[str]:
    student, teacher = (model_folder(directory, name) for name in ("Qwen3-4B", "Qwen3-32B"))
    return [
        "--config", str(EXAMPLES / "qwen3_32b_to_4b.yaml"),
        f"model.student={student}", f"model.teacher={teacher}",
        "rollout.engine=hf", "rollout.max_batch_size=16", *arguments,
    ]  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, directory: Path, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["plan", *command_line(directory, *arguments)])
    monkeypatch.setenv("COLUMNS", "80")
    return plan.main()


def test_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two pipeline ranks of two chunks each."""
    file = tmp_path / "plan.json"
    assert run(monkeypatch, tmp_path, "--gpus", "16", "--json", str(file), PIPELINE, CHUNKS) == 0
    shown = capsys.readouterr().out
    assert "16 GPUs = tensor 4 x pipeline 2 x data 2, sequence parallel, 2 chunks" in shown
    assert "the student is 2560 wide, the teacher 5120" in shown
    assert "it fits: " in shown
    assert max(map(len, shown.splitlines())) <= 80
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["fits"]
    assert found["data_parallel_size"] == 2
    stages = found["stages"]
    assert [stage["student_layers"] for stage in stages] == [
        [*range(9), *range(18, 27)], [*range(9, 18), *range(27, 36)],
    ]  # fmt: skip
    placed = [layer for stage in stages for layer in stage["teacher_layers"]]
    assert sorted(placed) == list(range(64))
    ranks = {rank["name"]: rank for rank in found["ranks"]}
    assert list(ranks) == ["stage 0, engine's owner", "stage 0", "stage 1"]
    for rank in ranks.values():
        totals = {phase: sum(rank["phases"][phase].values()) for phase in PHASES}
        assert rank["peak_bytes"] == totals[rank["peak_phase"]] == max(totals.values())
        assert f"{rank['peak_bytes'] / 1e9:.1f}" in shown
    # Every stage gathers all shards, on each of 4 ranks, and sends its own to the other stage.
    own, other = (4 * 2 * stage["student_parameters"]["total"] for stage in stages[::-1])
    sent = stages[1]["sent_bytes"]["weight_sync"]
    assert sent == pytest.approx(3 * (own + other) + own, rel=0.01)


def test_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a program: exit code 2, the reason on stderr, and the plan all the same."""
    file = tmp_path / "plan.json"
    options = ["--gpus", "8", "--gpu-memory", "42", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["plan", *command_line(tmp_path, *options)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(plan.__file__, run_name="__main__")
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: the run does not fit: the rollout phase needs")
    assert shown.err.endswith("GB: rollout.max_batch_size=8\n")
    assert not json.loads(file.read_text())["fits"]
    assert "What takes it" in shown.out
    assert "it fits" not in shown.out


def test_with_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    vllm = ["rollout.engine=vllm", "rollout.vllm.sleep_level=1"]
    assert run(monkeypatch, tmp_path, "--json", str(file), *vllm) == 0
    shown = " ".join(capsys.readouterr().out.split())
    engine = json.loads(file.read_text())["vllm"]
    assert (
        "vLLM: 4 engines; one takes 32.5 GB of a GPU awake, 0.5 GB and 8.0 of the host's asleep"
        in shown
    )
    assert f"holds {engine['num_tokens']:,} tokens, 16 of its 32 responses at once" in shown
    assert "rollout engine's CUDA context │ 0.5 │ 0.5 │ 0.5 │ 0.5" in shown
    assert "weights into the engine │ │ │ 8.0" in shown
    assert run(monkeypatch, tmp_path, "rollout.engine=vllm",
               "rollout.vllm.servers=[http://127.0.0.1:8000]") == 0  # fmt: skip
    assert "from a vLLM server, whose memory and time are not" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "6"], r"6 processes do not divide .*tensor_model_parallel_size = 4"),
        (["--gpus", "0"], "--gpus 0 .*has to be above 0"),
        (["--gpu-memory", "nan"], "--gpu-memory nan .*has to be above 0"),
        (["--mfu", "1.5"], "--mfu 1.5 .*at most 1"),
        (["--response-tokens", "9000"], r"--response-tokens 9000 .*max_new_tokens = 8192"),
        (["--json", "nowhere/plan.json"], "--json nowhere/plan.json: cannot be written: No such"),
        (["model.teacher=nowhere"], "nowhere: it does not exist"),
        (["--recommend", "--json", "plan.json"], "--json plan.json has no effect with --recommend"),
        (["--recommend", "--gpu-memory", "5"], "no layout of 4 GPUs .*with 5 GB .*fits"),
        (["--network-bandwidth", "0"], "--network-bandwidth 0.0 .*has to be above 0"),
        (["optimizer.learning_rate=1"], "unknown setting"),
    ],
)  # fmt: skip
def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(monkeypatch, tmp_path, *arguments)


def test_the_check_of_logprobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted behind the rollout, and less than the student's pass needs on every rank."""
    phases: list[list[dict[str, dict[str, int]]]] = []
    for overrides in ([], ["rollout.logprob_check_interval=10"]):
        file = tmp_path / f"{len(overrides)}.json"
        assert run(monkeypatch, tmp_path, "--gpus", "16", "--json", str(file), *overrides) == 0
        phases.append([rank["phases"] for rank in json.loads(file.read_text())["ranks"]])
    for without, with_check in zip(*phases, strict=True):
        workspace = with_check["rollout"]["workspace"]
        assert workspace >= without["rollout"].get("workspace", 0)
        assert sum(with_check["rollout"].values()) < sum(with_check["student"].values()) or (
            with_check["rollout"] == without["rollout"]
        )
        with_check["rollout"], without["rollout"] = {}, {}
        assert with_check == without


def test_targets_behind_a_bridge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 fp32 numbers instead of 5120 of bf16; the bridge itself need not be there."""
    targets = []
    bridge = ["bridge.path=missing", "bridge.rank=8", "loss.normalize=l2"]
    for overrides in ([], bridge):
        file = tmp_path / f"{len(overrides)}.json"
        large = ["--gpu-memory", "1000", "teacher.target_memory_gb=null"]
        assert run(monkeypatch, tmp_path, "--json", str(file), *large, *overrides) == 0
        rank = json.loads(file.read_text())["ranks"][0]
        targets.append(rank["phases"]["teacher"]["targets"])
    assert "targets behind the bridge: 8 numbers each" in capsys.readouterr().out
    assert targets[0] == targets[1] * 5120 * 2 / (8 * 4)


def test_projectors_that_train_count_as_the_students(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A matrix [5120, 2560] and a bias at 36 layers, whole on every rank of a stage."""
    found = []
    for overrides in ([], ["bridge.trainable=linear"]):
        file = tmp_path / f"{len(overrides)}.json"
        large = ["--gpus", "16", "--gpu-memory", "1000", PIPELINE]
        assert run(monkeypatch, tmp_path, "--json", str(file), *large, *overrides) == 0
        stages = json.loads(file.read_text())["stages"]
        found.append([stage["student_parameters"] for stage in stages])
    assert "projectors that train: 36 of 13112320 parameters each" in capsys.readouterr().out
    for without, with_projectors in zip(*found, strict=True):
        for kind in ("total", "trainable", "replicated"):
            assert with_projectors[kind] - without[kind] == 18 * (2560 + 1) * 5120, kind
        assert with_projectors["trainable_experts"] == 0
