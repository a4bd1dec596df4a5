import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from checkpoint_tools.megatron_to_hf import megatron_to_hf
from megatron_oprd.errors import UserError
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights import manifest
from megatron_oprd.weights.manifest import (
    ChecksumDifference,
    compare_checksums,
    read_checksums,
    read_file_checksums,
    stored_tensors,
)
from megatron_oprd.weights.torch_dist_files import TorchDistFiles
from tests.helpers.tiny import save_tiny_model, tiny_config

NORM = "model.norm.weight"
TP2_PP2 = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in both formats, as the tools write it."""
    root = tmp_path_factory.mktemp("manifest")
    save_tiny_model(root / "source", tiny_config("qwen3_moe"), seed=0, dtype=torch.bfloat16)
    hf_to_megatron(root / "source", root / "megatron", Settings(layout=TP2_PP2))
    megatron_to_hf(root / "megatron", root / "hf", max_shard_size=30_000)
    return root


def check(folder: Path) -> list[ChecksumDifference]:
    return compare_checksums(stored_tensors(folder), read_checksums(folder))


@pytest.mark.parametrize("rows_bytes", [2**26, 100])
def test_folders_are_as_they_were_written(
    folders: Path, monkeypatch: pytest.MonkeyPatch, rows_bytes: int
) -> None:
    monkeypatch.setattr(manifest, "ROWS_BYTES", rows_bytes)
    for name in ("hf", "megatron", "megatron/release"):
        stored = stored_tensors(folders / name)
        read: list[int] = []
        expected = read_checksums(folders / name)
        assert compare_checksums(stored, expected, advance=read.append) == []
        assert len(expected) == len(stored) > 10
        assert sum(read) == sum(one.num_bytes for one in stored)


@pytest.mark.parametrize("where", [0.1, 0.9])
def test_one_byte_of_a_chunk(folders: Path, tmp_path: Path, where: float) -> None:
    folder = shutil.copytree(folders / "megatron", tmp_path / "megatron")
    key = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    values = TorchDistFiles(folder / "release").read_slice(key, slice(2, 3), slice(5, 6))
    # Tensor parallelism divides the columns.
    stored = bytes(values.chunk(2, dim=-1)[0].contiguous().view(torch.uint8).flatten().tolist())
    (file,) = [f for f in (folder / "release").glob("*.distcp") if stored in f.read_bytes()]
    offset = file.read_bytes().index(stored)
    with file.open("r+b") as stream:
        stream.seek(offset + int(where * len(stored)))
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))
    (found,) = check(folder)
    assert found.name == f"{key}[2,5,0,0]"
    assert None not in (found.expected, found.found)
    assert found.expected != found.found


def test_tensors_that_are_missing_or_too_much(folders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in (folders / "hf").glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    tensors: dict[str, Any] = {}
    for file in (folders / "hf").glob("*.safetensors"):
        tensors |= load_file(file)
    tensors["more"] = tensors.pop(NORM)
    save_file(tensors, folder / "model.safetensors")
    checksum = read_checksums(folder)[NORM]
    assert check(folder) == [
        ChecksumDifference(name=NORM, expected=checksum, found=None),
        ChecksumDifference(name="more", expected=None, found=checksum),
    ]


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def of_training(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"step": 4, "student": {}}')


def broken(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_manifest, r"has no manifest\.json"),
        (of_training, r"manifest\.json has no checksums_xxh3_128"),
        (broken, r"manifest\.json cannot be read as JSON"),
    ],
)
@pytest.mark.parametrize("name", ["hf", "megatron"])
def test_without_checksums(
    folders: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(folders / name, tmp_path / name)
    damage(folder)
    with pytest.raises(UserError, match=message):
        read_checksums(folder)


def test_a_manifest_is_not_that_of_a_later_iteration(folders: Path, tmp_path: Path) -> None:
    """Training goes on in the folder of a conversion."""
    folder = shutil.copytree(folders / "megatron", tmp_path / "megatron")
    shutil.copytree(folder / "release", folder / "iter_0000010")
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        read_checksums(folder)


@pytest.mark.parametrize("entry", ['"x"', "3", '["big", "x"]', "null"])
def test_file_checksums_that_are_not_pairs(tmp_path: Path, entry: str) -> None:
    (tmp_path / "manifest.json").write_text(f'{{"files": {{"a": {entry}}}}}')
    with pytest.raises(UserError, match=r"manifest\.json: an entry of files is not"):
        read_file_checksums(tmp_path)
