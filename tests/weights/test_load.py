import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_oprd.errors import UserError
from megatron_oprd.models.families import mapping_table, read_architecture
from megatron_oprd.weights.accounting import check_tensors
from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_tiny_model, tiny_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
K_PROJ = "model.layers.2.self_attn.k_proj.weight"


def change(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replaces tensors of a model folder; None removes one."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    kept = {name: t.clone() for name, t in tensors.items() if t is not None}
    save_file(kept, file, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model", tiny_config("llama"), seed=0)
    return tmp_path / "model"


def check(folder: Path) -> None:
    checkpoint = HFCheckpoint(folder)
    architecture = read_architecture(checkpoint)
    table = mapping_table(architecture, padded_vocab_size=128)
    check_tensors(table, checkpoint, tied=architecture.tied)


def test_a_whole_folder_passes(folder: Path) -> None:
    check(folder)


@pytest.mark.parametrize("name", [K_PROJ, HEAD, "model.norm.weight"])
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    change(folder, {name: None})
    with pytest.raises(UserError, match=f"missing: {name}; left over: none"):
        check(folder)


@pytest.mark.parametrize("name", ["model.layers.4.mlp.up_proj.weight", "score.weight",
                                  "model.layers.0.self_attn.q_proj.bias"])  # fmt: skip
def test_a_left_over_tensor_is_named(folder: Path, name: str) -> None:
    change(folder, {name: torch.ones(3)})
    with pytest.raises(UserError, match=f"missing: none; left over: {name}"):
        check(folder)


def test_many_tensors_are_counted(folder: Path) -> None:
    change(folder, {f"extra.{number}": torch.ones(1) for number in range(9)})
    with pytest.raises(UserError, match=r"left over: extra\.0, .*extra\.4 and 4 more"):
        check(folder)


@pytest.mark.parametrize(("shape", "found"), [((8, 32), "8, 32"), ((32, 16), "32, 16")])
def test_a_wrong_shape_is_named(folder: Path, shape: tuple[int, ...], found: str) -> None:
    change(folder, {K_PROJ: torch.ones(shape)})
    with pytest.raises(UserError, match=rf"{K_PROJ} has shape \[{found}\].* says \[16, 32\]"):
        check(folder)


def test_old_rotary_buffers_are_no_weights(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(folder, {name: torch.ones(4)})
    check(folder)
    change(folder, {name.replace("inv_freq", "weight"): torch.ones(4)})
    with pytest.raises(UserError, match=r"left over: .*rotary_emb\.weight"):
        check(folder)


TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each rank read, or the error, for every case."""
    root = tmp_path_factory.mktemp("load")
    plain = save_pair(root / "plain", "qwen2", teacher_layers=6)
    equal = save_pair(root / "equal", "llama", tied=True)
    unequal = save_pair(root / "unequal", "llama", tied=True)
    for pair in (equal, unequal):
        embedding = load_file(pair / "student" / "model.safetensors")[EMBEDDING].clone()
        if pair is unequal:
            embedding[7, 3] += 1e-3
        change(pair / "student", {HEAD: embedding})
    cases: list[dict[str, Any]] = [
        {"name": "tp", "pair": str(plain), "overrides": [TP2]},
        {
            "name": "pp",
            "pair": str(plain),
            "overrides": [PP2, "taps.layers=[0,2]", "parallel.num_layers_per_stage=[1,3]"],
        },
        {"name": "equal", "pair": str(equal), "overrides": [TP2]},
        {"name": "unequal", "pair": str(unequal), "overrides": [TP2]},
    ]
    run_ranks("load", cases, 2, root)
    return root


def result(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((root / f"{name}_{rank}.json").read_text()) for rank in range(2)]


def sizes(pair: Path, model: str) -> dict[str, int]:
    checkpoint = HFCheckpoint(pair / model)
    return {f"{model}/{name}": math.prod(checkpoint.shape(name)) for name in checkpoint.names()}


def test_tensor_parallel_ranks_read_their_slices_only(loaded: Path) -> None:
    results = result(loaded, "tp")
    assert [one["error"] for one in results] == [None, None]
    ranks = [one["reads"] for one in results]
    for name, size in sizes(loaded / "plain", "student").items():
        shares = [rank[name] for rank in ranks]
        if "norm" in name:
            assert shares == [size, size], f"{name} is replicated"
        elif name.endswith((EMBEDDING, HEAD)):
            # 97 rows, padded to 128: the first rank's 64, and the 33 that are left.
            assert shares == [64 * 32, 33 * 32], name
        else:
            assert shares == [size / 2, size / 2], name


def test_a_stage_reads_its_layers_only(loaded: Path) -> None:
    ranks = [one["reads"] for one in result(loaded, "pp")]

    def layers(rank: int, model: str) -> set[int]:
        names = (name.split(".") for name in ranks[rank] if name.startswith(model))
        return {int(parts[2]) for parts in names if parts[1] == "layers"}

    assert (layers(0, "student"), layers(1, "student")) == ({0}, {1, 2, 3})
    # Student layers 0 and 2 of 4 are matched with teacher layers 0 and 3 of 6.
    assert layers(0, "teacher") | layers(1, "teacher") == {0, 1, 2, 3}
    assert not layers(0, "teacher") & layers(1, "teacher")
    ends = {f"student/{HEAD}", "student/model.norm.weight"}
    assert ends <= ranks[1].keys()
    assert not ends & ranks[0].keys()
    for model in ("student", "teacher"):
        assert f"{model}/{EMBEDDING}" in ranks[0]
        assert f"{model}/{EMBEDDING}" not in ranks[1]
    # Cut before its end, the teacher has neither final norm nor LM head.
    teachers = {name for rank in ranks for name in rank if name.startswith("teacher")}
    assert not teachers & {f"teacher/{HEAD}", "teacher/model.norm.weight"}
    # And nothing is read twice.
    total: Counter[str] = Counter()
    for rank in ranks:
        total.update(rank)
    assert {name: total[name] for name in ranks[1] if "student" in name}.items() <= sizes(
        loaded / "plain", "student"
    ).items()


def test_a_tied_head_that_is_stored_has_to_equal_the_embedding(loaded: Path) -> None:
    assert [one["error"] for one in result(loaded, "equal")] == [None, None]
    for one in result(loaded, "unequal"):
        assert "unequal/student has tie_word_embeddings = true" in one["error"]
        assert f"{HEAD} differs from {EMBEDDING}" in one["error"]
