"""Megatron's own checkpoints read here, ours loaded by Megatron, in layouts of 4 ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, Metadata, TensorStorageMetadata

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron, megatron_content
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights.expert_parts import ExpertParts, has_parts
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.torch_dist_files import TorchDistFiles
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_tiny_model, tiny_config
from tests.workers.torch_dist import VOCAB_MULTIPLE

pytestmark = pytest.mark.slow

MODELS: dict[str, dict[str, Any]] = {
    "llama_tied": {"family": "llama", "tie_word_embeddings": True},
    "llama_gqa": {"family": "llama", "num_attention_heads": 8, "num_key_value_heads": 4},
    "mistral": {"family": "mistral", "vocab_size": 101},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "phi3": {"family": "phi3", "num_key_value_heads": 4},
    "moe": {"family": "qwen3_moe"},
    "sinks": {"family": "gpt_oss"},
}
TP2, TP4 = ({"tensor_model_parallel_size": n} for n in (2, 4))
PP2, PP4 = ({"pipeline_model_parallel_size": n} for n in (2, 4))
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
EP2, EP4 = ({"expert_model_parallel_size": n} for n in (2, 4))
ETP1 = {"expert_tensor_parallel_size": 1}
A_LAYER_EACH = {"non_homogeneous_layers": True}
SINGLETONS = {"singleton_local_shards": True}

# What Megatron writes. name: (model, layout, how keys are made, layers of each stage).
SAVED: dict[str, tuple[str, dict[str, int], dict[str, bool], list[int] | None]] = {
    "dp4": ("mistral", {}, {}, None),
    "tp2": ("llama_tied", TP2, {}, None),
    "tp2_fused": ("phi3", TP2, {}, None),
    "pp2": ("qwen2", PP2, {}, None),
    "pp2_uneven": ("qwen3", PP2, {}, [1, 3]),
    "vpp2": ("qwen2", VPP2, {}, None),
    "ep2": ("moe", EP2, {}, None),
    "layers": ("qwen3", PP2, A_LAYER_EACH, None),
    "layers_moe": ("moe", TP2, A_LAYER_EACH, None),
    "singletons": ("llama_gqa", TP2, SINGLETONS, None),
    "singletons_moe": ("moe", EP2, SINGLETONS, None),
    "tp2_pp2": ("llama_gqa", {**TP2, **PP2}, {}, None),
    "tp4": ("phi3", TP4, {}, None),
    "pp4_tied": ("llama_tied", PP4, {}, None),
    "ep2_pp2": ("moe", {**EP2, **PP2}, {}, None),
    "ep2_tp2": ("moe", {**EP2, **TP2}, {}, None),
    "sinks_ep4_etp1": ("sinks", {**EP4, **TP2, **ETP1}, {}, None),
    "sinks_layers": ("sinks", EP2, A_LAYER_EACH, None),
    "ep4_etp1": ("moe", {**EP4, **TP2, **ETP1}, {}, None),
}
# What Megatron loads. name: (model, layout of the conversion, layout of the load, layers).
LOADED: dict[str, tuple[str, dict[str, int], dict[str, int], list[int] | None]] = {
    "dp4_of_tp4": ("mistral", TP4, {}, None),
    "tp2_of_tp4": ("llama_gqa", TP4, TP2, None),
    "tp2_of_one": ("phi3", {}, TP2, None),
    "pp2_of_tp2": ("qwen2", TP2, PP2, None),
    "pp2_uneven_of_pp4": ("llama_tied", PP4, PP2, [3, 1]),
    "vpp2_of_tp2_pp4": ("qwen3", {**TP2, **PP4}, VPP2, None),
    "ep2_of_tp2": ("moe", TP2, EP2, None),
    "tp2_of_ep2": ("moe", EP2, TP2, None),
    "tp4_of_tp2": ("phi3", TP2, TP4, None),
    "tp2_pp2_of_one": ("qwen2", {}, {**TP2, **PP2}, None),
    "sinks_tp2_etp1_of_ep4": ("sinks", EP4, {**EP2, **TP2, **ETP1}, None),
    "pp4_of_tp2_pp2": ("llama_tied", {**TP2, **PP2}, PP4, None),
    "ep2_tp2_of_ep4": ("moe", EP4, {**EP2, **TP2}, None),
    "ep2_pp2_of_tp2_ep2": ("moe", {**TP2, **EP2}, {**EP2, **PP2}, None),
}
IN_BFLOAT16 = {"pp2", "ep2_tp2", "pp2_of_tp2", "tp2_of_ep2"}


def target(layout: dict[str, int]) -> ParallelLayout:
    sizes: dict[str, Any] = {**layout}
    sizes.pop("virtual_pipeline_model_parallel_size", None)
    return ParallelLayout(**sizes)


def settings(layout: dict[str, int], name: str) -> Settings:
    dtype = torch.bfloat16 if name in IN_BFLOAT16 else None
    return Settings(layout=target(layout), make_vocab_size_divisible_by=VOCAB_MULTIPLE, dtype=dtype)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, and Megatron's checkpoints and reports by the cases' names."""
    root = tmp_path_factory.mktemp("torch_dist")
    for name, fields in MODELS.items():
        save_tiny_model(root / "hf" / name, tiny_config(**fields), seed=1)
    for name, (model, layout, _, _) in LOADED.items():
        hf_to_megatron(root / "hf" / model, root / f"{name}_in", settings(layout, name))

    def case(name: str, action: str, model: str, checkpoint: str, *rest: Any) -> dict[str, Any]:
        parallel, metadata, layers = rest
        return {
            "name": name,
            "action": action,
            "hf": str(root / "hf" / model),
            "checkpoint": checkpoint,
            "dtype": "bfloat16" if name in IN_BFLOAT16 else "float32",
            "parallel": parallel,
            "metadata": metadata,
            "layers_per_stage": layers,
        }

    cases = [
        case(name, "save", model, name, layout, keys, layers)
        for name, (model, layout, keys, layers) in SAVED.items()
    ]
    cases += [
        case(name, "load", model, f"{name}_in/release", layout, {}, layers)
        for name, (model, _, layout, layers) in LOADED.items()
    ]
    run_ranks("torch_dist", cases, 4, root)
    return root


@pytest.mark.parametrize("name", SAVED)
def test_megatrons_checkpoint_is_read_as_the_model_it_was_made_of(root: Path, name: str) -> None:
    model = root / "hf" / SAVED[name][0]
    opened = open_checkpoint(root / name, hf_config=model)
    opened.check_tensors()
    expected = load_file(model / "model.safetensors")
    if has_parts(opened.table):  # experts one by one
        parts = ExpertParts(HFCheckpoint(model))
        expected = {name: parts.read(name) for name in parts.names()}
    assert set(opened.source.names()) == set(expected)
    for tensor, values in expected.items():
        found = opened.source.read(tensor)
        dtype = torch.bfloat16 if name in IN_BFLOAT16 else torch.float32
        assert found.dtype == opened.source.dtype(tensor) == dtype
        assert torch.equal(found, values.to(dtype)), tensor
        rows = slice(len(values) // 3, len(values) // 3 * 2 + 1)
        assert torch.equal(opened.source.read_slice(tensor, rows), values.to(dtype)[rows]), tensor
        if values.dim() == 2:
            columns = slice(5, values.shape[1] - 3)
            found = opened.source.read_slice(tensor, rows, columns)
            assert torch.equal(found, values.to(dtype)[rows, columns]), tensor


@pytest.mark.parametrize("name", LOADED)
def test_megatron_loads_a_conversion_in_any_layout(root: Path, name: str) -> None:
    reports = json.loads((root / f"{name}.json").read_text())
    assert len(reports) == 4
    assert all(count > 0 and not differing for count, differing in reports), reports


@pytest.mark.parametrize("name", [name for name, (_, _, keys, _) in SAVED.items() if not keys])
def test_a_conversion_is_cut_as_megatron_cuts(root: Path, name: str) -> None:
    """Same tensors, chunks, dtypes and objects as a run of the layout writes."""
    model, layout, _, _ = SAVED[name]
    opened = open_checkpoint(root / "hf" / model)
    content = megatron_content(opened, settings(layout, name))
    metadata = FileSystemReader(root / name).read_metadata()
    chunks = [chunk for file in content.files for chunk in file.chunks]
    ours = {(c.key, c.global_shape, c.dtype, c.starts, c.shape) for c in chunks}
    assert len(ours) == len(chunks)
    assert ours == {
        (key, tuple(stored.size), stored.properties.dtype, tuple(c.offsets), tuple(c.sizes))
        for key, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
        for c in stored.chunks
    }
    objects = {name for file in content.files for name in file.objects}
    theirs = set(TorchDistFiles(root / name).objects)
    theirs.discard("common_state/shard_0_1")  # common.pt of megatron-core 0.19
    # Norms have an extra state with Transformer Engine only.
    assert {name for name in objects if "norm" not in name} == theirs


def test_the_files_beside_the_tensors_are_those_that_megatron_writes(root: Path) -> None:
    ours, theirs = root / "tp2_of_one_in" / "release", root / "tp4"
    found, expected = (json.loads((x / "metadata.json").read_text()) for x in (ours, theirs))
    assert expected.items() <= found.items()  # megatron-core 0.19 leaves out the common backend
    common = torch.load(ours / "common.pt")
    assert common["checkpoint_version"] == 3.0  # others make Megatron reorder query, key, value
    assert common["content_metadata"] == {"singleton_local_shards": False}
    assert isinstance(FileSystemReader(ours).read_metadata(), Metadata)
