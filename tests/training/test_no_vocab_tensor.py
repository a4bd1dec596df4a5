"""OPRD needs no logits: nothing of the vocabulary's size but the embedding and the LM head."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks

# The vocabulary is prime, padded to twice a prime, and no other size is a multiple of either, so
# that also a flattened [b * s * vocabulary] gives itself away.
VOCAB_SIZE, HALF = 199, 101
HIDDEN = 32
TP2 = "parallel.tensor_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
BF16 = "model.params_dtype=bf16"
# name: (ranks, overrides)
RUNS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "one_bf16": (1, [BF16]),
    "one_full_recompute": (
        1,
        [
            "recompute.recompute_granularity=full",
            "recompute.recompute_method=uniform",
            "recompute.recompute_num_layers=1",
        ],
    ),
    "tp2": (2, [TP2]),
    "tp2_sp_bf16": (2, [TP2, SP, BF16]),
}
LOGITS = [(run, whose) for run in ("one", "tp2") for whose in ("student", "teacher")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of every case."""
    root = tmp_path_factory.mktemp("vocabulary")
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for heads in ("tied", "untied"):
        pair = save_pair(root / heads, "llama", tied=heads == "tied", vocab_size=VOCAB_SIZE)
        for name, (ranks, overrides) in RUNS.items():
            case = {
                "name": f"{heads}.{name}",
                "pair": str(pair),
                "overrides": [f"model.make_vocab_size_divisible_by={2 * HALF}", *overrides],
                "vocab_size": VOCAB_SIZE,
                "logits_of": None,
            }
            cases[ranks].append(case)
            for run, whose in LOGITS:
                if run == name:
                    with_logits = {"name": f"{heads}.{name}.{whose}", "logits_of": whose}
                    cases[ranks].append(case | with_logits)
    for ranks, of_ranks in cases.items():
        run_ranks("created_tensors", of_ranks, ranks, root)
    return root


def _split(results: Path, name: str, ranks: int) -> tuple[set[str], list]:
    """The operations that made tensors like the embedding, and other vocabulary-sized tensors."""
    rows = 2 * HALF // ranks
    like_the_embedding, others = set(), []
    for operation, shape in torch.load(results / f"{name}.pt"):
        if shape in ((rows, HIDDEN), (rows * HIDDEN,)):
            like_the_embedding.add(operation)
        elif any(size and (size % HALF == 0 or size % VOCAB_SIZE == 0) for size in shape):
            others.append((operation, shape))
    return like_the_embedding, others


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("heads", ["tied", "untied"])
def test_no_tensor_of_the_vocabulary(results: Path, heads: str, name: str) -> None:
    like_the_embedding, others = _split(results, f"{heads}.{name}", RUNS[name][0])
    assert others == []
    # The whole step was seen: the embedding's gradient and its update by Adam are there.
    assert {"aten.embedding_dense_backward.default", "aten._fused_adamw_.default"} <= (
        like_the_embedding
    )


@pytest.mark.parametrize(("name", "whose"), LOGITS)
@pytest.mark.parametrize("heads", ["tied", "untied"])
def test_logits_show(results: Path, heads: str, name: str, whose: str) -> None:
    ranks = RUNS[name][0]
    _, others = _split(results, f"{heads}.{name}.{whose}", ranks)
    logits = [shape for _, shape in others if shape[-1] == 2 * HALF // ranks and shape[0] != HIDDEN]
    assert logits
