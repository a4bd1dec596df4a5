import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_oprd.errors import UserError
from megatron_oprd.weights import hf_files
from megatron_oprd.weights.hf_files import HFCheckpoint, check_output_folder, write_hf_folder

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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    for name in [*carried, "README.md", "pytorch_model.bin", "pytorch_model.bin.index.json",
                 ".gitattributes", "model.gguf"]:  # fmt: skip
        (folder / name).write_text(name)
    (folder / "onnx").mkdir()
    assert [path.name for path in HFCheckpoint(folder).companion_files()] == carried


def remove_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def only_pickles(folder: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "model.safetensors.index.json"):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


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
        (write("config.json", "[]"), r"config.json must hold a JSON object, found list"),
        (write(INDEX, "nope"), r"index.json is not readable as JSON"),
        (write(INDEX, "{}"), r"index.json must have a 'weight_map'"),
        (write(INDEX, index_of({"x": "../hf/a.safetensors"})), r"names of files in its folder"),
        (lambda folder: (folder / "b.safetensors").unlink(), r"names b.safetensors, which is miss"),
        (lambda folder: (folder / INDEX).unlink(), r"has no safetensors weights: give"),
        (only_pickles, r"pickles only \(pytorch_model.bin\); convert them to safetensors"),
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


@pytest.mark.parametrize("max_shard_size", [10**9, 4000, 1])
def test_transformers_loads_what_was_written(tmp_path: Path, max_shard_size: int) -> None:
    model = tiny_model()
    companion = tmp_path / "generation_config.json"
    model.generation_config.save_pretrained(tmp_path)
    state = model.state_dict()
    out = tmp_path / "deep" / "out"

    returned = write_hf_folder(
        out,
        iter(state.items()),
        config=model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]},
        companion_files=[companion],
        max_shard_size=max_shard_size,
    )

    assert returned == out
    assert (out / companion.name).read_bytes() == companion.read_bytes()
    shards = sorted(out.glob("*.safetensors"))
    if max_shard_size == 10**9:
        assert [path.name for path in shards] == ["model.safetensors"]
    else:
        assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
        assert len(shards) == len(state) if max_shard_size == 1 else 1 < len(shards) < len(state)
        for shard in shards:
            sizes = [tensor.nbytes for tensor in load_file(shard).values()]
            assert len(sizes) == 1 or sum(sizes) <= max_shard_size
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
        assert sorted(index["weight_map"]) == sorted(state)
    assert {path.name for path in out.parent.iterdir()} == {"out"}
    assert {oct(path.stat().st_mode) for path in out.iterdir()} == {
        oct((out / "config.json").stat().st_mode)
    }

    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_shards_are_filled_up_to_the_limit(tmp_path: Path) -> None:
    tensors = [(str(i), torch.full((size,), float(i))) for i, size in enumerate([2, 2, 3, 9, 1])]
    write_hf_folder(tmp_path / "out", tensors, config=CONFIG, companion_files=[], max_shard_size=16)
    shards = [sorted(load_file(f)) for f in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert shards == [["0", "1"], ["2"], ["3"], ["4"]]


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = [("rows", base[1:]), ("transposed", torch.arange(6.0).reshape(2, 3).T)]
    out = write_hf_folder(tmp_path / "out", tensors, config=CONFIG, companion_files=[])
    loaded = load_file(out / "model.safetensors")
    assert torch.equal(loaded["rows"], base[1:])
    assert torch.equal(loaded["transposed"], torch.arange(6.0).reshape(2, 3).T)


def forbidden_stream() -> Iterator[tuple[str, Tensor]]:
    raise AssertionError("the stream was touched")
    yield


def test_existing_folder_needs_force(tmp_path: Path) -> None:
    out = two_shards(tmp_path / "out")
    before = contents(out)
    with pytest.raises(UserError, match=r"out is not empty; give another folder, or --force"):
        write_hf_folder(out, forbidden_stream(), config=CONFIG, companion_files=[])
    assert contents(out) == before

    (tmp_path / "empty").mkdir()
    for folder, force in ((out, True), (tmp_path / "empty", False)):
        write_hf_folder(
            folder, [("z", torch.ones(3))], config=CONFIG, companion_files=[], force=force
        )
        assert HFCheckpoint(folder).names() == ["z"]
        assert not (folder / "a.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "empty"}


def test_force_spares_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"has no config.json"):
        check_output_folder(tmp_path, force=True)
    with pytest.raises(UserError, match=r"a file has this name"):
        check_output_folder(tmp_path / "thesis.tex", force=True)
    check_output_folder(tmp_path / "new", force=False)


def test_replaces_the_folder_it_reads_from(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "hf")
    source = HFCheckpoint(folder)
    stream = ((name, source.read(name) + 1) for name in source.names())
    write_hf_folder(folder, stream, config=CONFIG, companion_files=[], force=True)
    assert torch.equal(HFCheckpoint(folder).read("x"), torch.full((2, 3), 2.0))


@pytest.mark.parametrize("force", [False, True])
def test_failing_stream_leaves_nothing(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    before = contents(two_shards(out)) if force else {}

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(4)
        yield "b", torch.ones(4)
        assert any(path.name.endswith(".tmp") for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hf_folder(
            out, failing(), config=CONFIG, companion_files=[], max_shard_size=16, force=force
        )
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if force else [])
    assert not force or contents(out) == before


def test_failing_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = two_shards(tmp_path / "out")
    before = contents(out)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match=r"cannot write .*out: no"):
        write_hf_folder(out, [("a", torch.ones(1))], config=CONFIG, companion_files=[], force=True)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unwritable_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*file/out: "):
        write_hf_folder(
            tmp_path / "file" / "out", forbidden_stream(), config=CONFIG, companion_files=[]
        )

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_files, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write .*out: .*No space left"):
        write_hf_folder(tmp_path / "out", [("a", torch.ones(1))], config=CONFIG, companion_files=[])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [([], "no tensors"), ([("a", torch.ones(1)), ("a", torch.ones(1))], "a came twice")],
)
def test_streams_that_are_wrong(
    tmp_path: Path, tensors: list[tuple[str, Tensor]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_hf_folder(tmp_path / "out", tensors, config=CONFIG, companion_files=[])
    assert list(tmp_path.iterdir()) == []
