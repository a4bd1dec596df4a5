"""Whole runs whose teacher reads privileged text, or the same text in other tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from megatron_oprd.data.tokenizers import load_tokenizer
from megatron_oprd.rollout.engine import Rollout
from tests.data.test_alignment import byte_level
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import CHAT_TEMPLATE

pytestmark = pytest.mark.slow

TP2_SP = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
COMMON = ["train_iters=2", "optimizer.lr=0.01"]
SELF = [
    "teacher_prompt.privileged_key=extra.answer",
    "teacher_prompt.max_tokens=100",
    "teacher.refresh_interval=1",
    "teacher.ema_decay=0.5",
    "output_loss.kind=reverse_kl",
]
OWN = ["teacher_prompt.tokenizer=own"]
LAYOUTS = {"one": (1, []), "tp2_sp": (2, TP2_SP), "dp2": (2, [])}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reading")
    same = save_pair(root / "same", "llama", tied=True)
    # Narrower than its teacher, which has a tokenizer with merges; the student's has none.
    other = save_pair(
        root / "other",
        "qwen3",
        teacher_layers=5,
        teacher_vocab_size=400,
        teacher_fields={"hidden_size": 48},
    )
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(other / "teacher")
    for pair in (same, other):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"the {a} + {b} jumps"}],
                "extra": {"answer": a + b},
            }
            for a in range(4)
            for b in range(4)
        ]
        (pair / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (root / "bridge.yaml").write_text(
        f"""
output_dir: {root / "bridge"}
model: {{student: {other / "student"}, teacher: {other / "teacher"}, params_dtype: fp32}}
teacher_prompt: {{tokenizer: own}}
data: {{prompts: [{other / "prompts.jsonl"}], max_prompt_tokens: 64}}
rollout: {{prompts_per_step: 4, samples_per_prompt: 2, max_new_tokens: 12}}
fit: {{ranks: [2, 4], num_prompts: 16}}
"""
    )
    for name, (ranks, overrides) in LAYOUTS.items():
        case = {"name": f"bridge.{name}", "config": str(root / "bridge.yaml")}
        run_ranks("build_bridge", [case | {"overrides": overrides}], ranks, root)
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for name, (ranks, layout) in LAYOUTS.items():
        own_teacher = [f"model.teacher={same / 'student'}", *SELF]
        bridge = [f"bridge.path={root / 'bridge.one'}", "loss.normalize=l2", *OWN]
        for kind, pair, overrides in (("self", same, own_teacher), ("own", other, bridge)):
            overrides = [*COMMON, *overrides, *layout]
            cases[ranks].append(
                {"name": f"{kind}.{name}", "pair": str(pair), "overrides": overrides}
            )
    for name, interval in (("never", "null"), ("after_two", "2"), ("after_one", "1")):
        refresh = [f"model.teacher={same / 'student'}", *SELF[:2], "optimizer.lr=0.1"]
        overrides = [*COMMON, *refresh, f"teacher.refresh_interval={interval}"]
        cases[1].append({"name": name, "pair": str(same), "overrides": overrides})
    for ranks, of_ranks in cases.items():
        run_ranks("loop", of_ranks, ranks, root)
    return root


def rollouts(root: Path, name: str) -> list[list[Rollout]]:
    return torch.load(root / f"{name}.pt", weights_only=False)["rollouts"]


def records(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


def text(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["self", "own"])
@pytest.mark.parametrize("layout", ["tp2_sp", "dp2"])
def test_layout_changes_nothing(root: Path, kind: str, layout: str) -> None:
    # An update is the same up to rounding, which may flip a token of the second step's rollouts.
    assert rollouts(root, f"{kind}.{layout}")[0] == rollouts(root, f"{kind}.one")[0]
    found, expected = records(root, f"{kind}.{layout}")[0], records(root, f"{kind}.one")[0]
    for key in ("loss", "grad_norm", "paired_share"):
        assert found[key] == pytest.approx(expected[key], rel=5e-5), key
    assert found["cosine"] == pytest.approx(expected["cosine"], abs=1e-6)


def test_privileged_text_is_in_the_teachers_prompt_only(root: Path) -> None:
    tokenizer = load_tokenizer(root / "same" / "student")
    for rollout in rollouts(root, "self.one")[0]:
        assert rollout.teacher is not None
        assert rollout.teacher.response_ids == rollout.response_ids
        ours, theirs = (
            text(tokenizer, ids) for ids in (rollout.prompt_ids, rollout.teacher.prompt_ids)
        )
        a, b = divmod(rollout.prompt_index, 4)
        assert ours == f"the {a} + {b} jumps"
        assert theirs == f"{ours}\n\nReference solution:\n{a + b}"
    first, second = records(root, "self.one")
    assert first["loss"] > 0
    assert first["output_loss"] > 0
    assert first["paired_share"] == second["paired_share"] == 1.0


def test_the_teacher_follows_at_the_end_of_an_interval(root: Path) -> None:
    never, after_two, after_one = (
        [record["loss"] for record in records(root, name)]
        for name in ("never", "after_two", "after_one")
    )
    assert after_two == pytest.approx(never, rel=1e-5)
    assert after_one[0] == pytest.approx(never[0], rel=1e-5)
    assert abs(after_one[1] - never[1]) > 1e-2 * never[1]


def test_responses_are_read_in_the_teachers_tokens(root: Path) -> None:
    student, teacher = (load_tokenizer(root / "other" / m) for m in ("student", "teacher"))
    step = rollouts(root, "own.one")[0]
    num_pairs = 0
    for rollout in step:
        read = rollout.teacher
        assert read is not None
        # The teacher's chat template has words where the student's tokenizer has special tokens.
        prompt = text(student, rollout.prompt_ids)
        assert text(teacher, read.prompt_ids) == f"<user>{prompt}<assistant>"
        assert text(teacher, read.response_ids) == text(student, rollout.response_ids)
        assert (read.response_ids[-1:] == (teacher.eos_token_id,)) == rollout.finished
        for ours, theirs in read.pairs:
            assert text(student, rollout.response_ids[: ours + 1]) == text(
                teacher, read.response_ids[: theirs + 1]
            )
        num_pairs += len(read.pairs)
    num_tokens = sum(len(rollout.response_ids) for rollout in step)
    assert 0 < num_pairs < num_tokens
    assert records(root, "own.one")[0]["paired_share"] == pytest.approx(num_pairs / num_tokens)


@pytest.mark.parametrize("layout", ["tp2_sp", "dp2"])
def test_the_bridge_between_tokenizers_is_the_same_in_every_layout(root: Path, layout: str) -> None:
    found, expected = (
        json.loads((root / f"bridge.{name}" / "manifest.json").read_text())
        for name in (layout, "one")
    )
    assert found["data"]["rows"] == expected["data"]["rows"] > 0
    for rank, cosines in expected["cosine"].items():
        for when in ("before", "after"):
            assert found["cosine"][rank][when] == pytest.approx(cosines[when], abs=1e-3)
