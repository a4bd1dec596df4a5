"""Tools that are killed, run out of disk or meet odd places: whole results, or none."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from checkpoint_tools.prune_depth import main as prune_depth
from megatron_oprd.errors import UserError
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_tiny_model, tiny_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("interrupted")
    save_tiny_model(root / "hf", tiny_config("qwen3_moe"), seed=0, dtype=torch.bfloat16)
    hf_to_megatron(root / "hf", root / "megatron", Settings())
    return root


@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_and_out_of_disk(folders: Path, tmp_path: Path, kills: int) -> None:
    """In workers/interrupted.py: kill -9 at seeded moments of every tool."""
    shards = ["--max-shard-size", "60KB"]
    hf, megatron = str(folders / "hf"), str(folders / "megatron")
    cases = [
        {"tool": "prune_depth", "arguments": ["--hf", hf, "--num-layers", "3", *shards]},
        {"tool": "hf_to_megatron", "arguments": ["--hf", hf, *_LAYOUT]},
        {"tool": "megatron_to_hf", "arguments": ["--megatron", megatron, *shards]},
    ]
    run_ranks("interrupted", [case | {"kills": kills, "seed": 1} for case in cases], 1, tmp_path)


_LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]


def prune(folders: Path, out: Path, *more: str) -> None:
    prune_depth(["--hf", str(folders / "hf"), "--out", str(out), "--num-layers", "2", *more])


def test_linked_target(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/real")
    for more in ([], ["--force"]):
        prune(folders, tmp_path / "link", *more)
        assert (tmp_path / "link").readlink() == Path("disk/real")
        assert (tmp_path / "disk/real/model.safetensors").is_file()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_places_that_cannot_be_written(folders: Path, tmp_path: Path) -> None:
    for out in (Path("/proc/out"), Path("/dev/null/out")):
        with pytest.raises(UserError, match=str(out)):
            prune(folders, out)


def test_linked_source(folders: Path, tmp_path: Path) -> None:
    """As in the hub's cache, where files are links."""
    hub = tmp_path / "hub"
    hub.mkdir()
    for file in (folders / "hf").iterdir():
        (hub / file.name).symlink_to(file)
    prune_depth(["--hf", str(hub), "--out", str(tmp_path / "out"), "--num-layers", "4"])
    expected, found = (load_file(f / "model.safetensors") for f in (hub, tmp_path / "out"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not (tmp_path / "out/tokenizer.json").is_symlink()


def test_truncated_source(folders: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folders / "hf", tmp_path / "hf")
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"model.safetensors is not a whole safetensors file"):
        prune_depth(["--hf", str(source), "--out", str(tmp_path / "out"), "--num-layers", "2"])
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
