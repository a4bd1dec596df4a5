"""Training with vLLM rollouts: the layout changes nothing, and real SmolLM2 is distilled."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.prune_depth import evenly_spaced_layers, prune_depth
from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import ROOT, run_ranks
from tests.vllm.engines import check_greedy

SMOLLM2 = ROOT / ".cache/smollm2/SmolLM2-135M-Instruct"
VLLM = [
    "rollout.engine=vllm",
    "rollout.vllm.enforce_eager=true",
    "rollout.vllm.kv_cache_gb=0.25",
    "rollout.vllm.check_weights_interval=1",
    "rollout.logprob_check_interval=1",
    "train_iters=2",
]
TP2_SP = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
SPLIT = ["rollout.vllm.tensor_model_parallel_size=2"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
GREEDY = ["rollout.temperature=0", "optimizer.lr=0.01"]
NODES = ["rollout.vllm.start_servers=2", "rollout.vllm.server_nodes=[0,1]"]
CASES = {
    "hf": (2, ["train_iters=2", *GREEDY]),
    "tp2_sp": (2, [*VLLM, *GREEDY, *TP2_SP]),
    "ahead": (2, [*VLLM, *GREEDY, *TP2_SP, "rollout.max_staleness=1", "train_iters=3"]),
    "dp2_killed": (2, VLLM),
    # The untied LM head is frozen too.
    "frozen": (2, [*VLLM, *GREEDY, *PP2, "train_iters=3", "taps.layers=[0,1]"]),
    # Two engines of two workers, and four engines.
    "pp2_dp2": (4, [*VLLM, *PP2, *SPLIT]),
    "tp2_sp_dp2": (4, [*VLLM, *TP2_SP]),
    # Two servers, of which one is killed.
    "servers": (2, [*VLLM, *GREEDY, *PP2, "rollout.vllm.start_servers=2"]),
    # The same on two nodes, of which the second one's is killed and comes back.
    "nodes": (2, [*VLLM, *GREEDY, *PP2, *NODES, "train_iters=4"]),
    "hf_longer": (2, [*GREEDY, "train_iters=4"]),
}

# Runs that only slow tests look at.
NIGHTLY = {
    "ahead",
    "frozen",
    "dp2_killed",
    "pp2_dp2",
    "tp2_sp_dp2",
    "servers",
    "nodes",
    "hf_longer",
}
# The first rank's engine, or the last server, before the second step's rollouts.
KILLED: dict[str, dict[str, Any]] = {
    "dp2_killed": {"kill_engine_before": 1},
    "servers": {"kill_server_before": 1},
    "nodes": {
        "nodes": True,
        "kill_server_before": 1,
        "kill_server_of": [1],
        "wait_for_server_before": 3,
    },
}


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has the runs that the selected tests look at (their mark ``cases``), and no others."""
    needed = {
        name
        for item in request.session.items
        if item.path == request.path
        for mark in item.iter_markers("cases")
        for name in mark.args
    }
    root = tmp_path_factory.mktemp("vllm_loop")
    pair, untied = (
        save_pair(root / name, "llama", tied=tied, hidden_size=128, intermediate_size=192)
        for name, tied in (("pair", True), ("untied", False))
    )
    for ranks in (2, 4):
        cases = [
            {
                "name": name,
                "pair": str(untied if name == "frozen" else pair),
                "overrides": overrides,
                **KILLED.get(name, {}),
            }
            for name, (of, overrides) in CASES.items()
            if of == ranks and name in needed
        ]
        if cases:
            run_ranks("loop", cases, ranks, root)
    return root


def rollouts_of(root: Path, name: str) -> list[list[Any]]:
    """The rollouts of each step."""
    return torch.load(root / f"{name}.pt", weights_only=False)["rollouts"]


def warnings_of(root: Path, name: str) -> list[str]:
    return torch.load(root / f"{name}.pt", weights_only=False)["warnings"]


def records(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (root / name / "metrics.jsonl").read_text().splitlines()]


def tokens(rollouts: list[Any]) -> list[tuple[int, ...]]:
    return [rollout.response_ids for rollout in rollouts]


@pytest.mark.slow
@pytest.mark.cases("tp2_sp_dp2", "dp2_killed", "pp2_dp2")
def test_neither_layout_nor_engines_nor_a_killed_one_change_rollouts(root: Path) -> None:
    """Two engines, of which one is killed, sample what two others and four sample."""
    expected = rollouts_of(root, "tp2_sp_dp2")
    assert [len(of_step) for of_step in expected] == [8, 8]
    for name in ("dp2_killed", "pp2_dp2"):
        found = rollouts_of(root, name)
        assert [tokens(of_step) for of_step in found] == [tokens(of_step) for of_step in expected]
        for ours, theirs in zip(records(root, name), records(root, "tp2_sp_dp2"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert [one["rollout_engine_restarts"] for one in records(root, "dp2_killed")] == [0, 1]
    (warning,) = warnings_of(root, "dp2_killed")
    assert "ended with exit code -9" in warning


@pytest.mark.cases("tp2_sp", "hf")
def test_both_engines_follow_the_student(root: Path) -> None:
    found, expected = rollouts_of(root, "tp2_sp"), rollouts_of(root, "hf")
    for step in range(2):
        assert tokens(found[step]) == tokens(expected[step])
        for one in (*found[step], *expected[step]):
            assert one.weights_version == step
    assert found[0][0].logprobs != pytest.approx(found[1][0].logprobs, abs=1e-2)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.cases(name), *[pytest.mark.slow] * (name in NIGHTLY)])
        for name in ("tp2_sp", "dp2_killed", "frozen", "pp2_dp2", "tp2_sp_dp2", "servers", "nodes")
    ],
)
def test_log_probabilities_are_the_trainers(root: Path, name: str) -> None:
    """Up to rounding, also of an engine that got its weights anew."""
    for record in records(root, name):
        # Nats a token, of log-probabilities of up to 20.
        assert record["rollout_logprob_diff_mean"] < 1e-5 * 20
        assert record["rollout_logprob_diff_max"] < 1e-4 * 20
        assert record["weight_sync_logprob_diff_max"] < 1e-4 * 20
    assert not [one for one in warnings_of(root, name) if "differ" in one]


@pytest.mark.slow
@pytest.mark.cases("frozen")
def test_what_is_frozen_is_sent_once(root: Path) -> None:
    """Checks, and log-probabilities of the engine as of the trainer, say that the engine has it."""
    first, *others = (one["weight_sync_gb"] for one in records(root, "frozen"))
    assert 0 < others[0] == others[1] < 0.7 * first
    assert len({tokens(of_step)[0] for of_step in rollouts_of(root, "frozen")}) > 1


@pytest.mark.slow
@pytest.mark.cases("servers", "hf")
def test_one_of_two_servers_is_killed(root: Path) -> None:
    """The run goes on with the other, and the rollouts are those of engines on the ranks."""
    found = rollouts_of(root, "servers")
    for ours, expected in zip(found, rollouts_of(root, "hf"), strict=True):
        assert tokens(ours) == tokens(expected)
    assert [one["rollout_engine_restarts"] for one in records(root, "servers")] == [0, 0]
    assert any("is left out until the next sync" in one for one in warnings_of(root, "servers"))


@pytest.mark.slow
@pytest.mark.cases("nodes", "hf_longer")
def test_the_second_nodes_server_is_killed_and_comes_back(root: Path) -> None:
    """Its own node starts it again, and the last step's sync gives it the weights."""
    found, expected = (rollouts_of(root, name) for name in ("nodes", "hf_longer"))
    assert len(found) == 4
    assert [tokens(of_step) for of_step in found] == [tokens(of_step) for of_step in expected]
    assert [one["rollout_engine_restarts"] for one in records(root, "nodes")] == [0, 0, 0, 0]
    first, second = torch.load(root / "nodes.pt", weights_only=False)["warnings_of_ranks"]
    assert any("is left out until the next sync" in one for one in first)
    (again,) = (one for one in second if "is started again" in one)
    assert "ended with exit code 137" in again
    logs = [(root / "nodes" / f"vllm_server_{i}.log").read_text() for i in range(2)]
    assert [log.count("POST /finish_weight_update") for log in logs] == [4, 2]


@pytest.mark.slow
@pytest.mark.cases("ahead", "tp2_sp")
def test_one_step_off_policy(root: Path) -> None:
    """The second step's rollouts are of the weights from before the first update."""
    first, second, _ = rollouts_of(root, "ahead")
    checkpoint = HFCheckpoint(root / "pair" / "student")
    weights = {name: checkpoint.read(name) for name in checkpoint.names()}
    for of_step in (first, second):
        assert {rollout.weights_version for rollout in of_step} == {0}
        check_greedy(root / "pair" / "student", weights, of_step)
    assert tokens(second) != tokens(rollouts_of(root, "tp2_sp")[1])
    fresh, stale, _ = records(root, "ahead")
    assert (fresh["rollout_staleness"], stale["rollout_staleness"]) == (0, 1)
    assert fresh["rollout_logprob_diff_mean"] < 1e-4 < 1e-2 < stale["rollout_logprob_diff_mean"]
    # Fixed prompts are answered by the weights of the step's own sync.
    for record in (fresh, stale):
        assert record["weight_sync_logprob_diff_max"] < 1e-4 * 20


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs the demo's model: make demo or make test")
@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    """The demo's pair on two pipeline stages, two steps."""
    student = tmp_path / "student"
    prune_depth(SMOLLM2, student, evenly_spaced_layers(30, 24), force=False)
    shutil.copy(ROOT / "examples" / "demo.yaml", tmp_path / "run.yaml")
    overrides = [
        *VLLM,
        *(f"model.student={student}", f"model.teacher={SMOLLM2}"),
        *("rollout.prompts_per_step=2", "rollout.max_new_tokens=8", "rollout.temperature=0"),
        *("optimizer.lr_warmup_fraction=0", "data.max_prompt_tokens=128", "tensorboard=false"),
    ]
    case = {"name": "smollm2", "pair": str(tmp_path), "overrides": overrides}
    run_ranks("loop", [case], 2, tmp_path)
    first, *_, last = records(tmp_path, "smollm2")
    assert last["loss"] < first["loss"]
    checkpoint = HFCheckpoint(student)
    weights = {name: checkpoint.read(name).float() for name in checkpoint.names()}
    check_greedy(student, weights, rollouts_of(tmp_path, "smollm2")[0])
