import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from megatron_oprd.errors import UserError
from megatron_oprd.models.families import mapping_table, read_architecture
from megatron_oprd.weights.accounting import check_tied_head
from megatron_oprd.weights.hf_files import HFFolder
from megatron_oprd.weights.megatron_checkpoint import (
    MegatronCheckpoint,
    embedding_rows,
    is_megatron,
    resolve_checkpoint_folder,
)
from megatron_oprd.weights.torch_dist_files import TorchDistFiles
from tests.helpers.tiny import save_tiny_model, tiny_config
from tests.helpers.torch_dist import change_metadata, save_torch_dist

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("megatron_checkpoint")
    for name, tied in (("tied", True), ("untied", False)):
        save_tiny_model(root / name, tiny_config("llama", tie_word_embeddings=tied), seed=1)
        settings = Settings(make_vocab_size_divisible_by=8)
        hf_to_megatron(root / name, root / f"{name}_in_megatron", settings)
    return root


def tensors_of(models: Path, name: str) -> dict[str, Tensor]:
    files = TorchDistFiles(models / f"{name}_in_megatron" / "release")
    return {key: files.read_slice(key) for key in files.names()}


def opened(folder: Path, hf: Path) -> MegatronCheckpoint:
    files = TorchDistFiles(folder)
    config = HFFolder(hf)
    rows = embedding_rows(files)
    table = mapping_table(read_architecture(config), padded_vocab_size=rows)
    return MegatronCheckpoint(files, config, table)


def changed(models: Path, folder: Path, name: str, **changes: Tensor | None) -> MegatronCheckpoint:
    """The checkpoint of a model with tensors changed; None removes one."""
    tensors = {**tensors_of(models, name), **changes}
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    return opened(save_torch_dist(folder, kept), models / name)


def test_what_a_source_says(models: Path) -> None:
    source = opened(models / "untied_in_megatron" / "release", models / "untied")
    expected = load_file(models / "untied" / "model.safetensors")
    assert source.names() == list(expected)
    assert source.num_bytes() == sum(tensor.nbytes for tensor in expected.values())
    assert source.config == json.loads((models / "untied" / "config.json").read_text())
    assert source.hf_folder == models / "untied"
    assert "tokenizer.json" in [file.name for file in source.companion_files()]
    assert models / "untied_in_megatron" / "release" / "__0_0.distcp" in source.files()
    for name, tensor in expected.items():
        assert source.shape(name) == tensor.shape
        assert source.dtype(name) == tensor.dtype
        assert torch.equal(source.read(name), tensor)
    empty = source.read_slice("model.norm.weight", slice(4, 4))
    assert (empty.shape, empty.dtype) == ((0,), torch.float32)
    for call in (source.read, source.shape, source.dtype):
        with pytest.raises(UserError, match=r"release has no tensor 'model\.what'"):
            call("model.what")


@pytest.mark.parametrize("key", [EMBEDDING, OUTPUT, QKV, "decoder.final_layernorm.weight"])
def test_a_missing_tensor_is_named(models: Path, tmp_path: Path, key: str) -> None:
    message = "has no tensor 'embedding" if key == EMBEDDING else "missing: .*; left over: none"
    with pytest.raises(UserError, match=message) as error:
        changed(models, tmp_path / "c", "untied", **{key: None})
    last = "decoder.layers.3.self_attention.linear_qkv.weight"
    assert (last if key == QKV else key) in str(error.value)


@pytest.mark.parametrize(
    "key",
    ["decoder.layers.mlp.linear_fc1.bias", "decoder.layers.0.mlp.router.weight", "mtp.weight"],
)
def test_a_left_over_tensor_is_named(models: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"missing: none; left over: {key}"):
        changed(models, tmp_path / "c", "untied", **{key: torch.ones(4, 3)})


def test_a_wrong_shape_is_named(models: Path, tmp_path: Path) -> None:
    qkv = tensors_of(models, "untied")[QKV]
    with pytest.raises(UserError, match=r"linear_qkv.weight has shape \[3, .* says \[4, 64, 32\]"):
        changed(models, tmp_path / "layers", "untied", **{QKV: qkv[:3]})
    with pytest.raises(UserError, match=r"linear_qkv.weight has shape \[4, 60, 32\]"):
        changed(models, tmp_path / "rows", "untied", **{QKV: qkv[:, :60]})
    head = tensors_of(models, "untied")[OUTPUT]
    with pytest.raises(UserError, match=r"output_layer.weight has shape \[97, 32\].* \[104, 32\]"):
        changed(models, tmp_path / "head", "untied", **{OUTPUT: head[:97]})


def test_one_layer_of_two_names_is_left_over(models: Path, tmp_path: Path) -> None:
    fc1 = tensors_of(models, "untied")[FC1]
    name = "decoder.layers.2.mlp.linear_fc1.weight"
    with pytest.raises(UserError, match=rf"left over: {name}"):
        changed(models, tmp_path / "c", "untied", **{name: fc1[2]})


@pytest.mark.parametrize("rows", [97, 98, 128, 1000])
def test_any_padding_of_the_vocabulary(models: Path, tmp_path: Path, rows: int) -> None:
    tensors = tensors_of(models, "untied")
    padding = torch.full((rows - 97, 32), 7.0)  # Megatron trains it, so it is not always zero
    padded = {key: torch.cat([tensors[key][:97], padding]) for key in (EMBEDDING, OUTPUT)}
    source = changed(models, tmp_path / "c", "untied", **padded)
    expected = load_file(models / "untied" / "model.safetensors")
    for name in ("model.embed_tokens.weight", HEAD):
        assert torch.equal(source.read(name), expected[name])


def test_gate_and_up_projection_under_names_of_their_own(models: Path, tmp_path: Path) -> None:
    tensors = tensors_of(models, "untied")
    fc1 = tensors.pop(FC1)
    halves = {f"{FC1}_w": fc1[:, :64], f"{FC1}_v": fc1[:, 64:]}
    folder = save_torch_dist(tmp_path / "c", {**tensors, **halves})
    source = opened(folder, models / "untied")
    expected = load_file(models / "untied" / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor), name
    folder = save_torch_dist(tmp_path / "one", {**tensors, f"{FC1}_w": fc1[:, :64]})
    with pytest.raises(UserError, match=rf"missing: .*linear_fc1\.weight.*; left over: {FC1}_w"):
        opened(folder, models / "untied")


def test_what_is_no_weight_is_left_alone(models: Path, tmp_path: Path) -> None:
    states = {
        f"optimizer.state.exp_avg.{QKV}": torch.ones(2),
        f"chained_1.optimizer.state.param.{FC1}": torch.ones(2),
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.param": torch.ones(2),
    }
    source = changed(models, tmp_path / "c", "untied", **states)
    assert len(source.names()) == len(load_file(models / "untied" / "model.safetensors"))


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_tied_head_that_is_stored(models: Path, tmp_path: Path, is_equal: bool) -> None:
    head = tensors_of(models, "tied")[EMBEDDING].clone()
    if not is_equal:
        head[96, 31] += 1e-3
    source = changed(models, tmp_path / "c", "tied", **{OUTPUT: head})
    assert HEAD in source.names()
    assert torch.equal(source.read(HEAD), head[:97])
    if is_equal:
        check_tied_head(source)
    else:
        with pytest.raises(UserError, match=f"tie_word_embeddings = true, but .*{HEAD} differs"):
            check_tied_head(source)


def test_a_tied_head_may_have_nans(models: Path, tmp_path: Path) -> None:
    embedding = tensors_of(models, "tied")[EMBEDDING].clone()
    embedding[3] = torch.nan
    both = {EMBEDDING: embedding, OUTPUT: embedding.clone()}
    check_tied_head(changed(models, tmp_path / "c", "tied", **both))


def test_a_manifest_of_another_model(models: Path, tmp_path: Path) -> None:
    folder = save_torch_dist(tmp_path / "c", tensors_of(models, "untied"))
    manifest = json.loads((models / "tied_in_megatron" / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"lists what it was made of.* missing: {HEAD}"):
        opened(folder, models / "untied")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        opened(folder, models / "untied")


def test_no_embedding(models: Path, tmp_path: Path) -> None:
    folder = save_torch_dist(tmp_path / "c", {"encoder.weight": torch.ones(3)})
    with pytest.raises(UserError, match=r"no tensor 'embedding.* tensors: encoder\.weight"):
        opened(folder, models / "untied")


@pytest.mark.parametrize(
    ("content", "folder"),
    [("1200\n", "iter_0001200"), ("release", "release"), ("0", "iter_0000000")],
)
def test_a_tracker_names_the_checkpoint(tmp_path: Path, content: str, folder: str) -> None:
    for name in ("iter_0001200", "iter_0000000", "release"):
        save_torch_dist(tmp_path / name, {"t": torch.ones(1)})
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(content)
    assert resolve_checkpoint_folder(tmp_path) == tmp_path / folder
    assert resolve_checkpoint_folder(tmp_path / "iter_0001200") == tmp_path / "iter_0001200"
    assert is_megatron(tmp_path)


@pytest.mark.parametrize("content", ["7", "../elsewhere", ""])
def test_a_tracker_that_names_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(content)
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration\.txt says"):
        resolve_checkpoint_folder(tmp_path)


def test_a_run_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    steps = tmp_path / "run" / "checkpoints"
    for step in ("step_0000005", "step_0000040", "step_10000000", ".step_0000050.tmp"):
        (steps / step).mkdir(parents=True)
    for folder in (tmp_path / "run", steps, steps / "step_10000000"):
        assert resolve_checkpoint_folder(folder) == steps / "step_10000000"
    assert resolve_checkpoint_folder(tmp_path) == tmp_path
    assert not is_megatron(tmp_path)


def test_an_old_numbering_of_the_metadata_does_not_matter(models: Path, tmp_path: Path) -> None:
    """Chunks are found by their place, in whatever order `.metadata` lists them."""
    folder = tmp_path / "c"
    folder.mkdir()
    for file in (models / "untied_in_megatron" / "release").glob("*"):
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    change_metadata(folder, lambda data: data.state_dict_metadata[FC1].chunks.reverse())
    source = opened(folder, models / "untied")
    for name, tensor in load_file(models / "untied" / "model.safetensors").items():
        assert torch.equal(source.read(name), tensor), name
