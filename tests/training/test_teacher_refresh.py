"""A teacher that follows the student: by the formula, in every layout, and after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oprd.models.open_checkpoint import open_checkpoint
from tests.helpers.closeness import assert_close_relative
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks
from tests.helpers.selection import cases, selected

STEPS = 5
TP2_SP = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
VPP2 = [
    "parallel.pipeline_model_parallel_size=2",
    "parallel.virtual_pipeline_model_parallel_size=2",
    "batch.micro_batch_size=2",
]
BF16 = ["model.params_dtype=bf16"]
OVERLAP = ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]
# name: (ranks, interval, decay, other overrides)
CASES: dict[str, tuple[int, int, float, list[str]]] = {
    "every": (1, 1, 0.0, []),
    "second": (1, 2, 0.0, ["taps.layers=[0,2]"]),
    "average": (1, 1, 0.9, []),
    "average_bf16": (1, 2, 0.9, BF16),
    "average_with_head": (2, 1, 0.9, [*VPP2, "output_loss.kind=forward_kl"]),
    "tp": (2, 2, 0.5, TP2_SP),
    "dp_overlap": (2, 1, 0.0, OVERLAP),
}
LOADED = ("average", "average_bf16", "tp")
NIGHTLY = ("second", "average_bf16", "dp_overlap")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("refresh")
    pair = save_pair(root / "pair", "llama", tied=True)

    def case(name: str, load: str | None) -> dict[str, Any]:
        _, interval, decay, others = CASES[load or name]
        overrides = [
            f"model.teacher={pair / 'student'}",
            f"teacher.refresh_interval={interval}",
            f"teacher.ema_decay={decay}",
            # Something to learn: the teacher reads its own weights at first.
            "optimizer.lr=0.01",
            "optimizer.weight_decay=1",
            "optimizer.lr_warmup_fraction=0",
            *others,
        ]
        return {
            "name": name, "pair": str(pair), "overrides": overrides, "load": load, "steps": STEPS
        }  # fmt: skip

    wanted = {"average", *selected(request)}
    for ranks in (1, 2):
        names = [name for name, (count, *_) in CASES.items() if count == ranks and name in wanted]
        run_ranks("refresh", [case(name, None) for name in names], ranks, root)
        again = [case(f"{name}_again", name) for name in names if name in LOADED]
        run_ranks("refresh", again, ranks, root)
    return root


@pytest.mark.parametrize("name", cases(CASES, nightly=NIGHTLY))
def test_follows_the_student(results: Path, name: str) -> None:
    ranks, interval, decay, _ = CASES[name]
    for rank in range(ranks):
        seen = torch.load(results / f"{name}_{rank}.pt")
        for key, first in seen["teacher"][0].items():
            assert torch.equal(first, seen["student"][0][key])
            expected = first.double()
            for step in range(1, STEPS + 1):
                if step % interval == 0:
                    student = seen["student"][step][key].double()
                    expected = decay * expected + (1 - decay) * student
                found = seen["teacher"][step][key]
                if decay == 0:
                    assert torch.equal(found, expected.to(found.dtype)), (key, step)
                else:
                    tolerance = 1e-6 if found.dtype == torch.float32 else 2**-8
                    assert_close_relative(found, expected, tolerance, what=(key, step))
        changed = [
            not torch.equal(first, seen["teacher"][-1][key])
            for key, first in seen["teacher"][0].items()
        ]
        assert any(changed)


@pytest.mark.parametrize("name", cases(LOADED, nightly=NIGHTLY))
def test_resumed_bit_by_bit(results: Path, name: str) -> None:
    for rank in range(CASES[name][0]):
        whole = torch.load(results / f"{name}_{rank}.pt")
        again = torch.load(results / f"{name}_again_{rank}.pt")
        for which in ("student", "teacher"):
            for key, value in whole[which][-1].items():
                assert torch.equal(again[which][-1][key], value), (which, key)


def test_the_checkpoint_is_read_as_the_students(results: Path) -> None:
    opened = open_checkpoint(results / "average")
    opened.check_tensors()
    student = torch.load(results / "average_0.pt")["student"][2]
    found = opened.source.read("model.embed_tokens.weight")
    assert torch.equal(found, student["embedding.word_embeddings.weight"][: len(found)])
