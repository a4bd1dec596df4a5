import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron, megatron_content
from megatron_oprd.errors import UserError
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights import distcp_file, torch_dist_plan, torch_dist_writer
from megatron_oprd.weights.distcp_file import AlternatingBuffers, read_chunk, write_file
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.torch_dist_files import TorchDistFiles
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_tiny_model, tiny_config

# Files of a few chunks, so that a tiny model has several.
FILE_BYTES = 30_000
TP2 = Settings(layout=ParallelLayout(tensor_model_parallel_size=2), make_vocab_size_divisible_by=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch_dist_writer") / "hf"
    save_tiny_model(folder, tiny_config("qwen2"), seed=1)
    return folder


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch_dist_plan.plan_files, "__kwdefaults__", {"max_file_bytes": FILE_BYTES}
    )


def contents(folder: Path) -> dict[str, Any]:
    """The bytes of every file, and what `.metadata` says, whose pickle has no one form."""
    found: dict[str, Any] = {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".metadata"
    }
    metadata = FileSystemReader(folder / "release").read_metadata()
    return {
        **found,
        "stored": metadata.state_dict_metadata,
        "places": metadata.storage_data,
        "version": metadata.version,
    }


def test_padding_is_zero(model: Path, tmp_path: Path) -> None:
    settings = Settings(
        layout=ParallelLayout(tensor_model_parallel_size=4), make_vocab_size_divisible_by=128
    )
    files = TorchDistFiles(hf_to_megatron(model, tmp_path / "m", settings) / "release")
    embedding = files.read_slice("embedding.word_embeddings.weight")
    expected = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    assert embedding.shape == (512, 32)  # two of the four chunks are nothing but padding
    assert torch.equal(embedding[:97], expected)
    assert torch.equal(embedding[97:], torch.zeros(415, 32))


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_a_large_tensor_is_put_together_some_rows_at_a_time(
    model: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(distcp_file, "COPIED_BYTES", rows * 32 * 2)
    opened = open_checkpoint(model)
    reads: list[int] = []
    read_slice = HFCheckpoint.read_slice

    def counting(checkpoint: HFCheckpoint, name: str, *slices: slice, **options: Any) -> Tensor:
        tensor = read_slice(checkpoint, name, *slices, **options)
        reads.append(len(tensor))
        return tensor

    monkeypatch.setattr(HFCheckpoint, "read_slice", counting)
    content = megatron_content(opened, Settings(dtype=torch.bfloat16))
    chunk = content.files[0].chunks[0]
    values = read_chunk(opened.source, chunk)
    expected = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(values[:97], expected.bfloat16())
    assert max(reads) == min(rows, 97)
    assert sum(reads) == 97


def test_the_manifest_has_the_checksum_of_every_chunk(model: Path, tmp_path: Path) -> None:
    out = hf_to_megatron(model, tmp_path / "m", TP2)
    manifest = json.loads((out / "manifest.json").read_text())
    files = TorchDistFiles(out / "release")
    assert manifest["tool"] == "hf_to_megatron"
    assert manifest["nans"] == {}
    assert manifest["layout"]["tensor_model_parallel_size"] == 2
    assert str(model / "model.safetensors") in manifest["source"]
    fc1 = files.read_slice("decoder.layers.mlp.linear_fc1.weight")
    up_of_rank_1 = fc1[2, 96:128].numpy().tobytes()
    name = "decoder.layers.mlp.linear_fc1.weight[2,96,0]"
    assert manifest["checksums_xxh3_128"][name] == xxhash.xxh3_128_hexdigest(up_of_rank_1)
    assert len(manifest["checksums_xxh3_128"]) == sum(
        len(files.chunks(name)) for name in files.names()
    )


def test_nans_are_reported_and_kept(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(model, tmp_path / "hf")
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][40, 3:5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = hf_to_megatron(folder, tmp_path / "m", TP2)
    name = "decoder.layers.mlp.linear_fc1.weight[1,96,0]"
    assert json.loads((out / "manifest.json").read_text())["nans"] == {name: 2}
    assert f"2 values are NaN, as they came, in 1 chunks; the first is {name}" in caplog.text
    back = open_checkpoint(out).source.read("model.layers.1.mlp.up_proj.weight")
    expected = tensors["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(back.view(torch.int32), expected.view(torch.int32))


@pytest.mark.usefixtures("small_files")
def test_an_interrupted_conversion_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def writing(path: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        if len(written) == 4:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(path.name)
        return write_file(path, *arguments, **options)

    monkeypatch.setattr(torch_dist_writer, "write_file", writing)
    with pytest.raises(KeyboardInterrupt):
        hf_to_megatron(model, tmp_path / "m", TP2)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_otherwise_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(path: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        record = write_file(path, *arguments, **options)
        _, _, offset, length = record["entries"][3]
        with path.open("r+b") as stream:
            stream.seek(offset + length // 2)
            byte = stream.read(1)
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte[0] ^ 1]))
        return record

    monkeypatch.setattr(torch_dist_writer, "write_file", faulty)
    with pytest.raises(UserError, match=r"__\d_0\.distcp: .* reads back differently"):
        hf_to_megatron(model, tmp_path / "m", TP2)
    assert not (tmp_path / "m").exists()


def test_a_write_that_the_system_refuses_is_an_os_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save makes a RuntimeError of it."""
    opened = open_checkpoint(model)
    (file,) = megatron_content(opened, Settings()).files

    def write(path: Path) -> None:
        buffers = AlternatingBuffers()
        write_file(path, file, opened.source, buffers, on_written=lambda size: None)

    with pytest.raises(OSError, match="No space left"):
        write(Path("/dev/full"))

    def refused(value: object, stream: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904

    monkeypatch.setattr(torch, "save", refused)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file")


def test_two_processes_write_what_one_does(model: Path, tmp_path: Path) -> None:
    one = hf_to_megatron(model, tmp_path / "one", TP2)
    case = {"hf": str(model), "out": "two", "file_bytes": 10**9, "taken": "one"}
    run_ranks(
        "conversion", [case, {**case, "out": "two_small", "file_bytes": FILE_BYTES}], 2, tmp_path
    )
    assert contents(tmp_path / "two") == contents(one)
    report = json.loads((tmp_path / "two_small.json").read_text())
    assert all(report["written"]), "each of them wrote some of the files"
    assert not set(report["written"][0]) & set(report["written"][1])
    assert report["errors"] == [report["errors"][0]] * 2
    assert "one is not empty" in report["errors"][0]
    expected, found = (open_checkpoint(tmp_path / name).source for name in ("one", "two_small"))
    for name in expected.names():
        assert torch.equal(expected.read(name), found.read(name))
