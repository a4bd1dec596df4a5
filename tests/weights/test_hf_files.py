import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_oprd.errors import UserError
from megatron_oprd.weights.hf_files import HFCheckpoint

CONFIG = {"model_type": "llama", "num_hidden_layers": 1}


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def folder_with(folder: Path, files: dict[str, dict[str, Tensor]], index: object = None) -> Path:
    """Writes a checkpoint folder by hand, with safetensors alone."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def two_shards(folder: Path) -> Path:
    return folder_with(
        folder,
        {"a.safetensors": {"x": torch.ones(2, 3)}, "b.safetensors": {"y": torch.zeros(4)}},
        {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}},
    )


@pytest.mark.parametrize("max_shard_size", ["1GB", "5KB"])
def test_reads_what_transformers_wrote(tmp_path: Path, max_shard_size: str) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "1GB")

    checkpoint = HFCheckpoint(tmp_path)

    expected = model.state_dict()
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == torch.float32
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.num_bytes() == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.config["num_hidden_layers"] == 3


def test_reads_slices_across_shards(tmp_path: Path) -> None:
    checkpoint = HFCheckpoint(two_shards(tmp_path / "hf"))
    assert torch.equal(checkpoint.read_slice("x", slice(None), slice(1, 3)), torch.ones(2, 2))
    assert torch.equal(checkpoint.read_slice("y", slice(3, None)), torch.zeros(1))
    with pytest.raises(UserError, match="no tensor 'z'; it has 2 tensors, the first is 'x'"):
        checkpoint.read("z")


def test_companion_files(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "hf")
    carried = ["chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.model"]
    left = ["README.md", "manifest.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    for name in [*carried, *left, ".gitattributes", "model.gguf"]:
        (folder / name).write_text(name)
    (folder / "onnx").mkdir()
    assert [path.name for path in HFCheckpoint(folder).companion_files()] == carried


def test_files(tmp_path: Path) -> None:
    names = ["config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors"]
    assert [file.name for file in HFCheckpoint(two_shards(tmp_path / "hf")).files()] == names
    single = folder_with(tmp_path / "single", {"model.safetensors": {"x": torch.ones(1)}})
    (single / "tokenizer.json").write_text("{}")
    names = ["config.json", "model.safetensors"]
    assert [file.name for file in HFCheckpoint(single).files()] == names


def remove_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def instead(*names: str) -> object:
    """Files in the place of the safetensors."""

    def damage(folder: Path) -> None:
        for name in ("a.safetensors", "b.safetensors", "model.safetensors.index.json"):
            (folder / name).unlink()
        for name in names:
            (folder / name).write_bytes(b"")

    return damage


def truncate(folder: Path) -> None:
    path = folder / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def not_safetensors(folder: Path) -> None:
    (folder / "b.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")


def index_of(weight_map: object) -> str:
    return json.dumps({"weight_map": weight_map})


def write(name: str, text: str) -> object:
    return lambda folder: (folder / name).write_text(text)


def save(name: str, tensors: dict[str, Tensor]) -> object:
    return lambda folder: save_file(tensors, folder / name)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_folder, r"hf: it does not exist; give a folder"),
        (lambda folder: (folder / "config.json").unlink(), r"config.json is missing"),
        (write("config.json", "{"), r"config.json is not readable as JSON"),
        (write("config.json", '{"a": {"b": 1, "b": 2}}'), r"config.json has 'b' twice"),
        (write("config.json", "[]"), r"config.json must hold a JSON object, found list"),
        (write(INDEX, "nope"), r"index.json is not readable as JSON"),
        (write(INDEX, "{}"), r"index.json must have a 'weight_map'"),
        (write(INDEX, '{"weight_map": {"x": "a", "x": "b"}}'), r"index.json has 'x' twice"),
        (write(INDEX, index_of({"x": "../hf/a.safetensors"})), r"names of files in its folder"),
        (lambda folder: (folder / "b.safetensors").unlink(), r"names b.safetensors, which is miss"),
        (lambda folder: (folder / INDEX).unlink(), r"has no safetensors weights: give"),
        (instead("pytorch_model.bin"), r"pickles only \(pytorch_model.bin\); convert them to saf"),
        (instead("model-00001-of-00002.bin"), r"pickles only \(model-00001-of-00002.bin\)"),
        (instead("consolidated.00.pth", "tokenizer.json"), r"only \(consolidated.00.pth\); conv"),
        (instead("training_args.bin", "weights.pt"), r"pickles only \(weights.pt\)"),
        (instead("pytorch_model.bin.index.json"), r"pickles only \(pytorch_model.bin.index.json"),
        (instead("training_args.bin", "rng_state_0.pth"), r"has no safetensors weights: give a f"),
        (truncate, r"b.safetensors is not a whole safetensors file \(\d+ bytes\)"),
        (not_safetensors, r"b.safetensors is not a whole safetensors file \(42 bytes\)"),
        (
            save("b.safetensors", {"y": torch.zeros(4), "x": torch.ones(2, 3)}),
            r"'x' is in two shards, a.safetensors and b.safetensors",
        ),
        (
            write(INDEX, index_of({"x": "a.safetensors", "z": "b.safetensors"})),
            r"'z' is in b.safetensors, but that shard has no such",
        ),
        (
            write(INDEX, index_of({"x": "b.safetensors", "y": "a.safetensors"})),
            r"'x' is in b.safetensors, but that shard has no such",
        ),
        (save("model.safetensors", {"x": torch.ones(1)}), r"both model.safetensors and"),
        (save("b.safetensors", {"y": torch.zeros(4, dtype=torch.complex64)}), r"'y' has dtype C64"),
    ],
)  # fmt: skip
def test_damaged_folders(tmp_path: Path, damage: object, message: str) -> None:
    folder = two_shards(tmp_path / "hf")
    HFCheckpoint(folder)
    assert callable(damage)
    damage(folder)
    with pytest.raises(UserError, match=message):
        HFCheckpoint(folder)
