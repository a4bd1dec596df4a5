"""`test_megatron_to_hf` has the round trips, `test_torch_dist_layouts` Megatron's side."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools.hf_to_megatron import main
from checkpoint_tools.inspect import main as inspect
from checkpoint_tools.megatron_to_hf import main as megatron_to_hf
from megatron_oprd.errors import UserError
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.weights.torch_dist_files import TorchDistFiles
from tests.helpers.tiny import copy_with_config, save_tiny_model, tiny_config

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf_to_megatron") / "hf"
    save_tiny_model(folder, tiny_config("qwen3_moe"), seed=1)
    return folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--hf", model, "--out", tmp_path / "m", "--tensor-model-parallel-size", 2]
    arguments += ["--pipeline-model-parallel-size", 2, "--expert-model-parallel-size", 4]
    assert run(*arguments, "--dry-run") == 0
    assert not (tmp_path / "m").exists()
    printed = capsys.readouterr().out
    assert "embedding.word_embeddings.weight [256, 32] float32" in printed
    assert "decoder.layers.mlp.experts.experts.linear_fc1.weight [4, 8, 48, 32] float32" in printed
    assert f"would write {tmp_path / 'm'}" in printed
    assert run(*arguments) == 0
    assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").read_text() == "release"
    # Two tensor ranks of two stages, and as many of four expert ranks.
    distcp = list((tmp_path / "m" / "release").glob("*.distcp"))
    assert len(distcp) == 2 * 2 + 2 * 2 * 4
    with pytest.raises(UserError, match=r"m is not empty; .*--force"):
        run(*arguments)
    arguments += ["--force", "--dtype", "bfloat16", "--expert-tensor-parallel-size", 1]
    arguments += ["--make-vocab-size-divisible-by", 50]
    assert run(*arguments) == 0
    files = TorchDistFiles(tmp_path / "m" / "release")
    assert files.shape("embedding.word_embeddings.weight") == (100, 32)
    assert {files.dtype(name) for name in files.names()} == {torch.bfloat16}
    settings = json.loads((tmp_path / "m" / "manifest.json").read_text())["layout"]
    assert settings == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": 1,
    }


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_sizes_that_are_none(model: Path, tmp_path: Path, value: str) -> None:
    with pytest.raises(SystemExit):
        run("--hf", model, "--out", tmp_path / "m", f"--tensor-model-parallel-size={value}")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--tensor-model-parallel-size=3", "^--tensor-model-.* 3 does not divide the 4 attention"),
        ("--expert-model-parallel-size=3", "^--expert-model-.* 3 does not divide the 8 experts of"),
        ("--expert-tensor-parallel-size=5", "^--expert-tensor-.* 5 does not divide the 24 feed-"),
        ("--pipeline-model-parallel-size=5", "-parallel-size 5 .* 4 layers"),
    ],
)
def test_a_layout_that_does_not_fit(model: Path, tmp_path: Path, option: str, message: str) -> None:
    for more in (["--dry-run"], []):
        with pytest.raises(UserError, match=message):
            run("--hf", model, "--out", tmp_path / "m", option, *more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["expert-model-parallel-size", "expert-tensor-parallel-size"])
def test_expert_sizes_of_a_dense_model(tmp_path: Path, name: str) -> None:
    save_tiny_model(tmp_path / "hf", tiny_config("llama"), seed=0)
    arguments = ["--hf", tmp_path / "hf", "--out", tmp_path / "m", "--dry-run"]
    with pytest.raises(UserError, match=f"--{name} 2, but .*hf has no mixture of experts; leave"):
        run(*arguments, f"--{name}", 2)
    with pytest.raises(UserError, match=f"--{name} 2, but .*hf has no mixture of experts; leave"):
        inspect([str(tmp_path / "hf"), f"--{name}", "2"])
    assert run(*arguments, "--tensor-model-parallel-size", 2) == 0


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_values_that_are_too_large_for_the_dtype(tmp_path: Path, stored: torch.dtype) -> None:
    """Infinite ones stay as they are."""
    save_tiny_model(tmp_path / "hf", tiny_config("llama"), seed=0, dtype=stored)
    name = "model.layers.2.mlp.down_proj.weight"
    tensors = {name: t.clone() for name, t in load_file(tmp_path / "hf/model.safetensors").items()}
    tensors[name][5, 3:6] = torch.tensor([torch.inf, 65504.0, -torch.inf]).to(stored)
    tensors[name][7, 7] = torch.nan
    if stored == torch.bfloat16:
        tensors[name][5, 4] = 65280.0  # the next one is 65536
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    run("--hf", tmp_path / "hf", "--out", tmp_path / "fits", "--dtype", "float16")
    found = open_checkpoint(tmp_path / "fits").source.read(name)
    assert found[5, 3:6].tolist() == tensors[name][5, 3:6].tolist()

    tensors[name][9, 1], tensors[name][9, 2] = -7e4, 6.6e4
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    largest = 7e4 if stored == torch.float32 else 70144
    message = (
        rf"--dtype float16: .*hf has 2 finite values in {name} that would become infinite; the "
        rf"largest is {largest:.6g}, and float16 ends at 65504. .* give bfloat16 or float32"
    )
    with pytest.raises(UserError, match=message):
        run("--hf", tmp_path / "hf", "--out", tmp_path / "m", "--dtype", "float16")
    run("--hf", tmp_path / "hf", "--out", tmp_path / "wide")
    arguments = ["--megatron", tmp_path / "wide", "--out", tmp_path / "m", "--dtype", "float16"]
    with pytest.raises(UserError, match=message.replace("hf", "release")):
        megatron_to_hf([str(argument) for argument in arguments])
    assert not (tmp_path / "m").exists()


def test_a_model_that_is_not_whole(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: model\.layers\.2\.mlp\.experts\.5\.up_proj"):
        run("--hf", folder, "--out", tmp_path / "m", "--dry-run")
    other = copy_with_config(model, tmp_path / "other", hidden_act="gelu")
    with pytest.raises(UserError, match="hidden_act = 'gelu'"):
        run("--hf", other, "--out", tmp_path / "m")
    (tmp_path / "pickled").mkdir()
    shutil.copy(model / "config.json", tmp_path / "pickled")
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"found pickles only .* convert them to safetensors"):
        run("--hf", tmp_path / "pickled", "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_no_room_is_found_out_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    for more in (["--dry-run"], []):
        with pytest.raises(UserError, match=r"m needs [0-9,]+ bytes; the file system"):
            run("--hf", model, "--out", tmp_path / "m", *more)
    assert not list(tmp_path.iterdir())


def test_a_megatron_checkpoint_is_cut_anew(model: Path, tmp_path: Path) -> None:
    run("--hf", model, "--out", tmp_path / "one")
    run("--hf", tmp_path / "one", "--out", tmp_path / "two", "--tensor-model-parallel-size", 4)
    one, two = (open_checkpoint(tmp_path / name).source for name in ("one", "two"))
    assert one.names() == two.names()
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.names())
    assert one.config == two.config
