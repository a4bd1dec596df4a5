"""The export stream without what is frozen: names by their rule, values as they are on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks

TWO_LAYERS = "taps.layers=[0,1]"
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
EP2 = ["parallel.expert_model_parallel_size=2"]
EMBEDDING = "model.embed_tokens.weight"
# Name -> (pair, overrides, what trains alone, layers that are sent, other tensors that are sent)
CASES: dict[str, tuple[str, list[str], list[str] | None, list[int], set[str]]] = {
    "tp2": ("untied", [TWO_LAYERS, *TP2], None, [0, 1], {EMBEDDING}),
    "pp2": ("untied", [TWO_LAYERS, *PP2], None, [0, 1], {EMBEDDING}),
    "pp2_tied": ("tied", [*PP2, "taps.last_layer=pre_norm"], None, [0, 1, 2, 3], {EMBEDDING}),
    # With an LM head that is used, tied: the last stage has a copy of the embedding.
    "pp2_used_head": (
        "tied",
        [*PP2, "output_loss.kind=forward_kl"],
        None,
        [0, 1, 2, 3],
        {EMBEDDING, "model.norm.weight"},
    ),
    "ep2": ("moe", [TWO_LAYERS, *EP2], None, [0, 1], {EMBEDDING}),
    # One parameter takes its layer with it, on whichever stage or expert's rank it is.
    "pp2_one_parameter": (
        "untied",
        PP2,
        ["decoder.layers.3.self_attention.linear_proj.weight"],
        [3],
        set(),
    ),
    "ep2_one_expert": (
        "moe",
        EP2,
        ["decoder.layers.2.mlp.experts.experts.3.linear_fc1.weight"],
        [2],
        set(),
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("partial_export")
    save_pair(root / "untied", "llama")
    save_pair(root / "tied", "qwen3", tied=True)
    save_pair(root / "moe", "qwen3_moe")
    cases: list[dict[str, Any]] = [
        {"name": name, "pair": str(root / pair), "overrides": overrides, "trains": trains}
        for name, (pair, overrides, trains, _, _) in CASES.items()
    ]
    run_ranks("partial_export", cases, 2, root)
    return root


def _is_sent(name: str, layers: list[int], others: set[str]) -> bool:
    layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
    return name in others if layer is None else layer in layers


@pytest.mark.parametrize("name", CASES)
def test_what_is_sent(root: Path, name: str) -> None:
    pair, _, _, layers, others = CASES[name]
    source: dict[str, Tensor] = load_file(root / pair / "student" / "model.safetensors")
    found = torch.load(root / name)
    assert found["whole"].keys() == source.keys()
    assert found["partial"].keys() == {one for one in source if _is_sent(one, layers, others)}
    for one, tensor in found["partial"].items():
        assert torch.equal(tensor, source[one]), one
