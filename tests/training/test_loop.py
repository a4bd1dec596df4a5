"""The training loop: the same seed gives the same run in every layout; what is not finite stops."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_oprd.data.benchmarks import load_benchmarks
from megatron_oprd.evaluation.benchmarks import GenerationSettings, evaluate_on_benchmarks
from megatron_oprd.rollout.engine import SamplingParams
from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.data.test_benchmarks import row, write
from tests.helpers.pairs import LINEAR_UPDATES, save_pair
from tests.helpers.ranks import run_ranks
from tests.helpers.selection import cases as as_parameters
from tests.helpers.selection import selected
from tests.helpers.tiny import tiny_tokenizer

TP2_SP = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
KNOWN = 90  # tokens of a tokenizer that is smaller than the embedding
STEPS = ["train_iters=2", *LINEAR_UPDATES]
LARGE_UPDATES = [*LINEAR_UPDATES, "optimizer.lr=5"]
LAYOUTS = {
    "one": (1, []),
    "again": (1, []),
    "other_seed": (1, ["seed=99"]),
    "small_generation_batches": (1, ["rollout.max_batch_size=3"]),
    "tp2_sp": (2, TP2_SP),
    "pp2": (2, PP2),
    "dp2": (2, []),
    "dp2_pp2": (4, PP2),
    "moe_one": (1, []),
    # Two rollout engines, and each rank has half of the experts.
    "moe_ep2": (2, ["parallel.expert_model_parallel_size=2"]),
    "moe_ep2_pp2": (4, ["parallel.expert_model_parallel_size=2", *PP2]),
}
REFERENCES = ("one", "other_seed", "moe_one")
NIGHTLY = ("again", "small_generation_batches", "dp2_pp2", "moe_ep2_pp2")


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loop")
    pair = save_pair(root / "pair", "llama", tied=True)
    moe = save_pair(root / "moe_pair", "qwen3_moe")
    broken = save_pair(root / "broken", "llama")
    weights = load_file(broken / "teacher" / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = 3e38  # what it makes is infinite
    save_file(weights, broken / "teacher" / "model.safetensors", {"format": "pt"})
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    for name, (ranks, overrides) in LAYOUTS.items():
        if name in NIGHTLY and name not in selected(request):
            continue
        models = str(moe if name.startswith("moe") else pair)
        cases[ranks].append({"name": name, "pair": models, "overrides": [*STEPS, *overrides]})
    stop = ["train_iters=9", "optimizer.max_skipped_in_a_row=3"]
    cases[2].append({"name": "diverged", "pair": str(broken), "overrides": [*stop, *PP2]})
    cases[2].append(
        {"name": "skipping", "pair": str(broken), "overrides": [*STEPS, "tensorboard=true"]}
    )
    cases[1].append(
        {
            "name": "now_and_then",
            "pair": str(pair),
            "overrides": ["train_iters=5", "optimizer.max_skipped_in_a_row=2"],
            "skip_steps": [0, 2, 4],
        }
    )
    # The second part goes on where the first one ended.
    skipped = ["optimizer.lr_decay_iters=8", "optimizer.lr_decay_style=linear"]
    for name, steps in (("skipped_part", 2), ("skipped_whole", 3)):
        overrides = [f"train_iters={steps}", *skipped]
        cases[1].append(
            {"name": name, "folder": "skipped", "pair": str(broken), "overrides": overrides}
        )
    write(root / "sums.jsonl", [row("1+1", "2"), row("2*3", "6"), row("7-4", "3")])
    evaluated = [
        "train_iters=3", "evaluation.interval=2", f"evaluation.data=[{root}/sums.jsonl]",
        "evaluation.n=2", "evaluation.max_new_tokens=6", *LARGE_UPDATES,
    ]  # fmt: skip
    for ranks, name, overrides in (
        (1, "not_evaluated", ["train_iters=3", *LARGE_UPDATES]),
        (1, "evaluated", evaluated),
        (2, "evaluated_dp2", evaluated),
    ):
        cases[ranks].append({"name": name, "pair": str(pair), "overrides": overrides})
    small = save_pair(root / "small_tokenizer", "llama", tied=True)
    for model in ("student", "teacher"):
        tiny_tokenizer(KNOWN).save_pretrained(small / model)
    # The update moves the student by more than the threshold.
    compared = ["train_iters=3", "rollout.logprob_check_interval=2", "optimizer.lr=0.02"]
    sharp = ["rollout.temperature=0.5", "rollout.top_p=0.9"]
    for name, overrides, stale in (
        ("compared", compared, False),
        ("compared_sharp", [*compared, *sharp, *PP2], False),
        ("compared_stale", compared, True),
    ):
        cases[2].append({"name": name, "pair": str(small), "overrides": overrides, "stale": stale})
    frozen = ["train_iters=3", "taps.layers=[0,1]", "optimizer.lr=0.02", *PP2]
    for name, all_weights in (("frozen", False), ("frozen_all_sent", True)):
        cases[2].append(
            {"name": name, "pair": str(pair), "overrides": frozen, "all_weights": all_weights}
        )
    for ranks, of_ranks in cases.items():
        run_ranks("loop", of_ranks, ranks, root)
    return root


def records(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (root / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name", as_parameters([n for n in LAYOUTS if n not in REFERENCES], nightly=NIGHTLY)
)
def test_layout_changes_no_rollout(root: Path, name: str) -> None:
    one = "moe_one" if name.startswith("moe") else "one"
    found = torch.load(root / f"{name}.pt", weights_only=False)["rollouts"]
    expected = torch.load(root / f"{one}.pt", weights_only=False)["rollouts"]
    assert len(expected) == 2
    assert len(expected[0]) == 8
    assert found == expected
    assert records(root, name)
    for ours, theirs in zip(records(root, name), records(root, one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_what_is_frozen_need_not_be_sent_again(root: Path) -> None:
    found = torch.load(root / "frozen.pt", weights_only=False)["rollouts"]
    expected = torch.load(root / "frozen_all_sent.pt", weights_only=False)["rollouts"]
    assert found == expected
    assert len({rollouts[0].response_ids for rollouts in found}) == 3
    weights = load_file(root / "pair" / "student" / "model.safetensors")
    rest = ("model.layers.2.", "model.layers.3.", "model.norm.")
    whole, part = (
        sum(tensor.nbytes for name, tensor in weights.items() if not name.startswith(left_out))
        for left_out in ((), rest)
    )
    for name, sent in (("frozen", [whole, part, part]), ("frozen_all_sent", [whole] * 3)):
        found_gb = [one["weight_sync_gb"] for one in records(root, name)]
        assert found_gb == pytest.approx([count / 1e9 for count in sent])


def test_seed_and_step_change_rollouts(root: Path) -> None:
    first, second = torch.load(root / "one.pt", weights_only=False)["rollouts"]
    other = torch.load(root / "other_seed.pt", weights_only=False)["rollouts"]
    assert [r.response_ids for r in first] != [r.response_ids for r in second]
    assert [r.response_ids for r in first] != [r.response_ids for r in other[0]]


@pytest.mark.parametrize(("name", "pair"), [("pp2", "pair"), ("moe_ep2", "moe_pair")])
def test_exported_student_generates(root: Path, name: str, pair: str) -> None:
    folder = root / name / "student"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("1 plus 2", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    source = HFCheckpoint(root / pair / "student")
    exported = HFCheckpoint(folder)
    assert sorted(exported.names()) == sorted(source.names())
    assert exported.config == source.config
    assert {f.name for f in exported.companion_files()} == {
        f.name for f in source.companion_files()
    }


def test_metrics_are_complete(root: Path) -> None:
    first, second = records(root, "pp2")
    assert first.keys() == second.keys()
    for name in (
        *("loss", "cosine", "grad_norm", "lr", "tokens_per_second", "peak_memory_gb"),
        "tflops_per_gpu",
        *(
            "seconds_rollout",
            "seconds_weight_sync",
            "weight_sync_gb",
            "seconds_teacher",
            "seconds_student",
        ),
        *("seconds_optimizer", "seconds_step", "response_length_mean", "finished_share"),
    ):
        assert isinstance(first[name], float), name
    assert list(first["loss_per_layer"]) == list(first["cosine_per_layer"]) == ["0", "1", "2", "3"]
    parts = [v for k, v in second.items() if k.startswith("seconds_") and k != "seconds_step"]
    assert sum(parts) <= second["seconds_step"]
    assert first["mfu"] is None  # of a CPU nobody knows the peak
    assert first["skipped_steps"] == 0
    assert (first["rollout_staleness"], second["rollout_staleness"]) == (0, 0)


def test_non_finite_steps_are_skipped_and_counted(root: Path) -> None:
    """The step changes nothing, not even the schedule, and the run goes on."""
    first, second = records(root, "skipping")
    assert first["skipped"]
    assert second["skipped"]
    assert (first["skipped_steps"], second["skipped_steps"]) == (1, 2)
    assert first["lr"] == second["lr"]
    before = HFCheckpoint(root / "broken" / "student")
    after = HFCheckpoint(root / "skipping" / "student")
    for name in before.names():
        assert torch.equal(after.read(name), before.read(name)), name


def test_too_many_skipped_steps_stop_the_run(root: Path) -> None:
    stopped = torch.load(root / "diverged.pt", weights_only=False)["stopped"]
    assert "steps 0 to 2" in stopped
    assert len(records(root, "diverged")) == 3
    assert not (root / "diverged" / "student").exists()


def test_skipped_steps_with_others_between_them_stop_nothing(root: Path) -> None:
    assert not torch.load(root / "now_and_then.pt", weights_only=False)["stopped"]
    assert [r["skipped_steps"] for r in records(root, "now_and_then")] == [1, 1, 2, 2, 3]


def test_skipped_steps_do_not_count_in_the_schedule_after_a_resume(root: Path) -> None:
    of_run = records(root, "skipped")
    assert [r["skipped"] for r in of_run] == [True, True, True]
    assert of_run[0]["lr"] == of_run[1]["lr"] == of_run[2]["lr"]


@pytest.mark.parametrize("name", ["evaluated", "evaluated_dp2"])
def test_evaluation_every_n_steps_and_at_the_end(root: Path, name: str, tmp_path: Path) -> None:
    first, second, third = records(root, name)
    assert "seconds_evaluation" not in first
    assert "eval/sums" not in first
    assert "collapse_alarm" not in first
    for step, record in ((2, second), (3, third)):
        lines = (root / name / "evaluation" / f"step_{step}" / "sums.jsonl").read_text()
        samples = [json.loads(line) for line in lines.splitlines()]
        assert [(s["prompt_index"], s["sample_index"]) for s in samples] == [
            (prompt, sample) for prompt in range(3) for sample in range(2)
        ]
        metrics = record["eval/sums"]
        assert set(metrics) == {
            "avg@2", "best@2", "pass@1", "pass@2", "dist_4", "mean_length", "cut_share",
            "no_answer_share", "num_timed_out",
        }  # fmt: skip
        assert metrics["mean_length"] == sum(s["num_tokens"] for s in samples) / 6
        assert record["eval_responses"] == 6
        assert record["eval_score"] == sum(s["correct"] for s in samples) / 6
        assert metrics["avg@2"] == pytest.approx(record["eval_score"])
        assert record["collapse_alarm"] is False
    # The responses at the end are those of the exported student.
    evaluate_on_benchmarks(
        {"exported": root / name / "student"},
        load_benchmarks([root / "sums.jsonl"]),
        GenerationSettings(
            engine="hf",
            sampling=SamplingParams(
                temperature=0.7, top_p=0.95, max_new_tokens=6, samples_per_prompt=2, seed=1234
            ),
            dtype="float32",
            batch_size=6,
        ),
        tmp_path,
        device=torch.device("cpu"),
    )
    assert (tmp_path / "samples" / "exported" / "sums.jsonl").read_text() == lines


def test_evaluation_is_the_same_with_two_replicas_and_leaves_training_alone(root: Path) -> None:
    one, two = (root / name / "evaluation" for name in ("evaluated", "evaluated_dp2"))
    # The student moves enough between the two that other weights would be noticed.
    assert (one / "step_2" / "sums.jsonl").read_text() != (
        one / "step_3" / "sums.jsonl"
    ).read_text()
    for step in ("step_2", "step_3"):
        assert (one / step / "sums.jsonl").read_text() == (two / step / "sums.jsonl").read_text()
    losses, plain = (
        [record["loss"] for record in records(root, name)]
        for name in ("evaluated", "not_evaluated")
    )
    assert losses == plain


def logprob_size(root: Path, name: str) -> float:
    """The largest log-probability of a run's rollouts, as a number above 0."""
    of_steps = torch.load(root / f"{name}.pt", weights_only=False)["rollouts"]
    return max(abs(v) for step in of_steps for one in step for v in one.logprobs or ())


@pytest.mark.parametrize("name", ["compared", "compared_sharp"])
def test_engine_and_trainer_with_the_same_weights(root: Path, name: str) -> None:
    """However responses are sampled, the raw distributions are compared."""
    first, second, third = records(root, name)
    assert not any("logprob" in key or "_kl" in key for key in second)
    size = logprob_size(root, name)
    for record in (first, third):
        mean, largest = (record[f"rollout_logprob_diff_{kind}"] for kind in ("mean", "max"))
        assert 0 <= mean <= 1e-6 * size
        assert mean <= largest <= 1e-5 * size
        assert abs(record["rollout_kl"]) <= 1e-6 * size
        assert 0 <= record["rollout_k3_kl"] <= 1e-10 * size**2
        assert 0 <= record["weight_sync_logprob_diff_mean"] <= 1e-6 * size
        assert 0 <= record["weight_sync_logprob_diff_max"] <= 1e-5 * size
    assert torch.load(root / f"{name}.pt", weights_only=False)["warnings"] == []


def test_an_engine_with_old_weights_gives_a_warning(root: Path) -> None:
    first, _, third = records(root, "compared_stale")
    assert first["rollout_logprob_diff_mean"] <= 1e-6 * logprob_size(root, "compared_stale")
    mean = third["rollout_logprob_diff_mean"]
    assert mean > 0.1
    assert third["rollout_k3_kl"] > 1e-3
    warning, of_fixed = torch.load(root / "compared_stale.pt", weights_only=False)["warnings"]
    assert warning.startswith("step 2: the rollout engine's log-probabilities differ from the")
    assert f"{mean:.3g} nats" in warning
    after_sync = third["weight_sync_logprob_diff_mean"]
    assert after_sync > 0.1
    assert f"after fixed prompts differ from the student's by {after_sync:.3g} nats" in of_fixed
    assert "weights that it was sent last" in of_fixed
