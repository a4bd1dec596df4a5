"""Training in bf16 with fp32 main parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.closeness import assert_close_relative
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow

BF16, MBS2 = "model.params_dtype=bf16", "batch.micro_batch_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
TRAINING = ["optimizer.lr=1e-3", "optimizer.lr_warmup_fraction=0"]
METHODS = {
    "all_layers": [],
    "two_layers": ["taps.layers=[0,1]"],
    "projector": ["bridge.trainable=mlp"],
}
# (method, layout): (ranks, overrides)
LAYOUTS: dict[tuple[str, str], tuple[int, list[str]]] = {
    ("all_layers", "one"): (1, []),
    ("all_layers", "tp2_sp"): (
        2,
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    ),
    ("all_layers", "pp2"): (2, [PP2, MBS2]),
    ("all_layers", "dp2_distributed_optimizer"): (2, [MBS2]),
    ("two_layers", "pp2"): (2, [PP2, MBS2]),
    ("projector", "one"): (1, []),
    ("projector", "dp2_distributed_optimizer"): (2, [MBS2]),
}
STEPS = 10
LR, TINY_STEPS = 2e-5, 30
# Updates far below what bf16 resolves at these weights.
TINY = [
    f"optimizer.lr={LR}",
    "optimizer.lr_warmup_fraction=0",
    "optimizer.lr_decay_style=constant",
    "optimizer.weight_decay=0.1",
    "optimizer.clip_grad=0.5",
    "optimizer.adam_beta2=0.95",
]
OPTIMIZERS = {
    "distributed": "optimizer.use_distributed_optimizer=true",
    "plain": "optimizer.use_distributed_optimizer=false",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of every case."""
    root = tmp_path_factory.mktemp("bf16")
    pair = str(save_pair(root / "pair", "qwen3", teacher_layers=7, tied=True))
    training = {"pair": pair, "steps": STEPS, "trace": False}
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for method, settings in METHODS.items():
        overrides = [*TRAINING, *settings]
        cases[1].append({"name": f"{method}.fp32", "overrides": overrides} | training)
    for (method, name), (ranks, layout) in LAYOUTS.items():
        overrides = [BF16, *TRAINING, *METHODS[method], *layout]
        cases[ranks].append({"name": f"{method}.{name}", "overrides": overrides} | training)
    for name, optimizer in OPTIMIZERS.items():
        cases[1].append(
            {
                "name": f"tiny.{name}",
                "pair": pair,
                "overrides": [BF16, *TINY, optimizer],
                "steps": TINY_STEPS,
                "trace": True,
            }
        )
    for ranks, of_ranks in cases.items():
        run_ranks("bf16", of_ranks, ranks, root)
    return root


@pytest.mark.parametrize(("method", "layout"), LAYOUTS)
def test_trains_as_fp32_does(results: Path, method: str, layout: str) -> None:
    found, expected = (torch.load(results / f"{method}.{name}.pt") for name in (layout, "fp32"))
    assert found["dtypes"] == {torch.bfloat16}
    assert expected["dtypes"] == {torch.float32}
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=0.02, atol=0)
    assert float(expected["losses"][-1].mean()) < 0.9 * float(expected["losses"][0].mean())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_main_parameters_are_those_of_adamw_in_fp32(results: Path, optimizer: str) -> None:
    found = torch.load(results / f"tiny.{optimizer}.pt")
    start, main = found["weights"][0], found["main"]
    expected = {name: weight.float() for name, weight in start.items()}
    matrices = [weight for weight in expected.values() if weight.dim() > 1]
    vectors = [weight for weight in expected.values() if weight.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.95),
    )
    for gradients in found["gradients"]:
        for name, weight in expected.items():
            assert gradients[name].dtype == torch.float32
            weight.grad = gradients[name]
        torch.nn.utils.clip_grad_norm_(expected.values(), 0.5)
        adamw.step()
    for name, weight in expected.items():
        moved = weight - start[name].float()
        assert float(moved.abs().max()) > 10 * LR, name
        # fp32 itself resolves 6e-8 of a weight.
        assert_close_relative(main[name], weight, 3e-6, what=name)
        assert torch.equal(found["weights"][-1][name], main[name].bfloat16()), name


def test_updates_below_bf16_add_up(results: Path) -> None:
    """One step moves hardly any bf16 weight, thirty move many."""
    found = torch.load(results / "tiny.distributed.pt")

    def share_moved(name: str, step: int) -> float:
        start, now = found["weights"][0][name], found["weights"][step][name]
        return _share(start != now)

    name = "model.layers.1.mlp.up_proj.weight"
    assert share_moved(name, 1) < 0.05
    assert share_moved(name, TINY_STEPS) > 0.2
    assert _share(found["main"][name] != found["weights"][0][name].float()) > 0.99


def _share(condition: Tensor) -> float:
    return float(condition.float().mean())
