import json
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

from megatron_oprd.config.load import load_config
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.record import write_record
from tests.helpers.pairs import config_of, save_pair
from tests.helpers.ranks import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pair(tmp_path / "pair", "llama")
    out = tmp_path / "run"
    config = config_of(tmp_path / "pair", [f"output_dir={out}", "optimizer.lr=3e-5"])
    write_record(make_plan(config, world_size=1), world_size=1)
    assert load_config(out / "config.yaml") == config
    return out


def test_versions_and_hardware(folder: Path) -> None:
    found = json.loads((folder / "environment.json").read_text())
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["hardware"]["world_size"] == 1
    assert len(found["hardware"]["gpus"]) == torch.cuda.device_count()
    assert found["hardware"]["memory_gb"] > 0.1


def test_the_commit_is_gits(folder: Path) -> None:
    found = json.loads((folder / "environment.json").read_text())
    if not (ROOT / ".git").exists():
        assert found["git"] is None
        return
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    commit = None if found["git"] is None else found["git"]["commit"]
    assert commit == (asked.stdout.strip() if asked.returncode == 0 else None)
