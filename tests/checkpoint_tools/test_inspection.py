import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from checkpoint_tools.inspection import parts, ranges, shares, tensor_groups
from megatron_oprd.errors import UserError
from megatron_oprd.models.families import read_architecture
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.helpers.tiny import save_tiny_model, tiny_config

H, VOCAB, LAYERS, EXPERTS, CHOSEN, EXPERT_WIDTH = 32, 97, 4, 8, 2, 24
HEAD_DIM, HEADS, GROUPS = 16, 4, 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspection")
    save_tiny_model(root / "moe", tiny_config("qwen3_moe"), seed=0, dtype=torch.bfloat16)
    save_tiny_model(root / "tied", tiny_config("llama", tie_word_embeddings=True), seed=0)
    save_tiny_model(root / "phi3", tiny_config("phi3"), seed=0)
    return root


@pytest.mark.parametrize("name", ["moe", "tied", "phi3"])
def test_parts_are_transformers_parameters(folders: Path, name: str) -> None:
    checkpoint = HFCheckpoint(folders / name)
    architecture = read_architecture(checkpoint)
    found = parts(checkpoint, tied=architecture.tied)
    model = AutoModelForCausalLM.from_pretrained(folders / name)
    assert sum(part.parameters or 0 for part in found) == model.num_parameters()
    assert sum(part.num_bytes for part in found) == checkpoint.num_bytes()
    by_name = {part.name: part for part in found}
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    assert by_name["norms"].parameters == sum(p.numel() for p in norms)
    assert "other" not in by_name
    assert ("LM head" in by_name) == (name != "tied")


def test_active_parameters(folders: Path) -> None:
    checkpoint = HFCheckpoint(folders / "moe")
    by_name = {part.name: part for part in parts(checkpoint, tied=False)}
    of_expert = 3 * H * EXPERT_WIDTH
    assert by_name["experts"].parameters == LAYERS * EXPERTS * of_expert
    assert by_name["experts"].active == LAYERS * CHOSEN * of_expert
    assert by_name["router"].active == by_name["router"].parameters == LAYERS * EXPERTS * H
    assert by_name["embedding"].parameters == VOCAB * H
    assert by_name["attention"].parameters == LAYERS * H * HEAD_DIM * (2 * HEADS + 2 * GROUPS)


def test_groups(folders: Path) -> None:
    by_pattern = {group.pattern: group for group in tensor_groups(HFCheckpoint(folders / "moe"))}
    group = by_pattern["model.layers.{0-3}.mlp.experts.{0-7}.up_proj.weight"]
    assert group.shape == (EXPERT_WIDTH, H)
    assert group.dtype == torch.bfloat16
    assert group.count == LAYERS * EXPERTS
    assert by_pattern["lm_head.weight"].count == 1
    assert sum(g.count for g in by_pattern.values()) == len(HFCheckpoint(folders / "moe").names())


def test_ranges() -> None:
    assert ranges([5, 0, 1, 2, 8, 7]) == "0-2,5,7-8"
    assert ranges([3]) == "3"


def of(folders: Path, name: str, *, padded: int, virtual: int = 1, **layout: Any) -> list[Any]:
    checkpoint = HFCheckpoint(folders / name)
    return shares(
        read_architecture(checkpoint),
        checkpoint,
        ParallelLayout(**layout),
        virtual_stages=virtual,
        padded_vocab_size=padded,
    )


def test_shares_by_formula(folders: Path) -> None:
    """Tensor parallelism 2, pipeline 3, experts over 4 ranks and not split."""
    first, second, third = of(
        folders, "moe", padded=98,
        tensor_model_parallel_size=2, pipeline_model_parallel_size=3,
        expert_model_parallel_size=4, expert_tensor_parallel_size=1,
    )  # fmt: skip
    attention = H * HEAD_DIM * (2 * HEADS + 2 * GROUPS) // 2
    layer = attention + 2 * H + 2 * HEAD_DIM + EXPERTS * H + EXPERTS // 4 * 3 * H * EXPERT_WIDTH
    vocabulary = 98 // 2 * H
    assert [share.layers for share in (first, second, third)] == [[0, 1], [2], [3]]
    assert first.parameters == vocabulary + 2 * layer
    assert second.parameters == layer
    assert third.parameters == layer + H + vocabulary
    assert first.num_bytes == 2 * first.parameters


def test_virtual_stages(folders: Path) -> None:
    found = of(folders, "tied", padded=97, virtual=2, pipeline_model_parallel_size=2)
    assert [share.layers for share in found] == [[0, 2], [1, 3]]
    model = AutoModelForCausalLM.from_pretrained(folders / "tied")
    assert sum(share.parameters for share in found) == model.num_parameters()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            {"tensor_model_parallel_size": 3},
            r"size 3 does not divide the 4 attention heads of .*moe",
        ),
        ({"pipeline_model_parallel_size": 5}, r"5 is more than the .*4 layers"),
        ({"expert_model_parallel_size": 3}, r"size 3 does not divide the 8 experts of"),
    ],
)
def test_layouts_that_do_not_divide(folders: Path, layout: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        of(folders, "moe", padded=97, **layout)


def test_active_parameters_of_a_family_that_is_not_known(tmp_path: Path) -> None:
    """Mixtral's experts are 2 of 8; one whose numbers stand nowhere is not guessed."""
    tensors = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight": torch.zeros(4, 3)
        for expert in range(8)
    }
    tensors["model.layers.0.block_sparse_moe.gate.weight"] = torch.zeros(8, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    by_name = {part.name: part for part in parts(HFCheckpoint(tmp_path), tied=False)}
    assert (by_name["experts"].parameters, by_name["experts"].active) == (96, 24)
    assert by_name["router"].active == 24
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    by_name = {part.name: part for part in parts(HFCheckpoint(tmp_path), tied=False)}
    assert (by_name["experts"].parameters, by_name["experts"].active) == (96, None)


def test_packed_weights_are_not_counted(tmp_path: Path) -> None:
    packed = {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 3, dtype=torch.int32)}
    save_file(packed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (part,) = parts(HFCheckpoint(tmp_path), tied=False)
    assert (part.parameters, part.active, part.num_bytes) == (None, None, 48)
