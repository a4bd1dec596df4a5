"""What verify refuses before it works, and one folder in the place of two."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from checkpoint_tools.megatron_to_hf import megatron_to_hf
from checkpoint_tools.verify import main
from megatron_oprd.errors import UserError
from tests.helpers.tiny import copy_with_config, save_tiny_model, tiny_config

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify_input")
    for family in ("llama", "qwen3_moe"):
        save_tiny_model(root / family, tiny_config(family), seed=0)
    return root


def verify(a: Path, b: Path, *more: str) -> int:
    return main([str(a), str(b), "--level", "logits", *more])


def test_sequences_that_are_too_long(folders: Path, tmp_path: Path) -> None:
    llama = folders / "llama"
    short = copy_with_config(llama, tmp_path / "short", max_position_embeddings=16)
    message = r"--length 17; .*short was made for at most 16 \(max_position_embeddings\)"
    for pair in ((llama, short), (short, llama)):
        with pytest.raises(UserError, match=message):
            verify(*pair, "--length", "17")
    (tmp_path / "tokens").write_text(json.dumps([[1], [1] * 17]))
    with pytest.raises(UserError, match=r"tokens has a sequence of 17 tokens; .* at most 16"):
        verify(llama, short, "--tokens", str(tmp_path / "tokens"))
    assert verify(short, short, "--random", "1", "--length", "16") == 0


@pytest.mark.parametrize("tolerance", ["nan", "-1e-4", "small"])
def test_tolerances_that_are_none(
    folders: Path, capsys: pytest.CaptureFixture[str], tolerance: str
) -> None:
    with pytest.raises(SystemExit):
        verify(folders / "llama", folders / "llama", f"--tolerance={tolerance}")
    assert "is not a number of at least 0" in capsys.readouterr().err


@pytest.mark.parametrize("level", ["keys", "logits"])
def test_a_report_that_cannot_be_written(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """Found out before anything is read: there are no such checkpoints."""
    locked = tmp_path / "locked"
    locked.mkdir()
    writable = os.access
    # Permissions do not stop root.
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and writable(path, mode))
    for file, message in (
        (tmp_path, "is a folder; give a file to write"),
        (tmp_path / "none" / "report", r"cannot be written, .*none does not exist; make it first"),
        (locked / "report", r"cannot be written; give a file in another place"),
    ):
        with pytest.raises(UserError, match=rf"--report {file}:? {message}"):
            main(["no_a", "no_b", "--level", level, "--report", str(file)])


def test_one_folder_by_its_manifest(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checksums themselves are in weights/test_manifest."""
    megatron = hf_to_megatron(folders / "llama", tmp_path / "megatron", Settings())
    hf = megatron_to_hf(megatron, tmp_path / "hf")
    report = tmp_path / "report.json"
    for folder in (hf, megatron):
        assert main([str(folder), "--report", str(report)]) == 0
        assert json.loads(report.read_text()) == {
            "a": str(folder), "b": None, "level": "checksums", "equal": True, "checksums": [],
        }  # fmt: skip
        assert "equal at level checksums" in capsys.readouterr().out

    weights = load_file(hf / "model.safetensors")
    weights[NORM][3] += 1
    del weights["model.norm.weight"]
    save_file(weights, hf / "model.safetensors")
    assert main([str(hf), "--report", str(report)]) == 1
    found = json.loads(report.read_text())
    assert not found["equal"]
    assert {one["name"] for one in found["checksums"]} == {NORM, "model.norm.weight"}
    said = capsys.readouterr().out
    assert "DIFFERENT at level checksums: 2 differences of checksums" in said
    assert NORM in said
    with pytest.raises(UserError, match=r"llama has no manifest\.json"):
        main([str(folders / "llama")])
    for more in (["--level", "keys"], ["--dtype", "float32"], ["--hf-config", str(hf)]):
        with pytest.raises(SystemExit):
            main([str(hf), *more])


@pytest.mark.parametrize(
    ("model", "option", "message"),
    [
        ("llama", "--tensor-model-parallel-size=3", r"^--tensor-.* 3 does not divide the 4 att"),
        ("llama", "--pipeline-model-parallel-size=5", r"^--pipeline-.* 5 .* 4 layers"),
        ("llama", "--expert-model-parallel-size=2", r"^--expert-model-.* 2, but .* has no mixture"),
        ("qwen3_moe", "--expert-model-parallel-size=3", r"^--expert-.* 3 does not divide the 8 ex"),
    ],
)
def test_sizes_that_do_not_fit(folders: Path, model: str, option: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        verify(folders / model, folders / model, "--engine", "megatron", option)
