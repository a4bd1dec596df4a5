import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from megatron_oprd.errors import UserError
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.megatron_checkpoint import MegatronCheckpoint
from tests.helpers.tiny import copy_with_config, save_tiny_model, tiny_config


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as Hugging Face folder ``hf``, and in Megatron's format, padded to 128 rows."""
    root = tmp_path_factory.mktemp("open_checkpoint")
    save_tiny_model(root / "hf", tiny_config("qwen3"), seed=1)
    hf_to_megatron(root / "hf", root / "megatron", Settings())
    return root


def without_config(models: Path, tmp_path: Path) -> Path:
    """The checkpoint as another Megatron run would have written it."""
    folder = shutil.copytree(models / "megatron" / "release", tmp_path / "other" / "iter_0000007")
    shutil.rmtree(folder / "hf")
    (tmp_path / "other" / "latest_checkpointed_iteration.txt").write_text("7")
    return tmp_path / "other"


def test_both_formats_are_one_model(models: Path) -> None:
    hf, megatron = (open_checkpoint(models / name) for name in ("hf", "megatron"))
    assert isinstance(hf.source, HFCheckpoint)
    assert isinstance(megatron.source, MegatronCheckpoint)
    assert hf.architecture == megatron.architecture
    assert [m.megatron for m in hf.table] == [m.megatron for m in megatron.table]
    assert hf.table[0].local_shape(1) == (97, 32)
    assert megatron.table[0].local_shape(1) == (128, 32)
    for opened in (hf, megatron):
        opened.check_tensors()
        for name, tensor in load_file(models / "hf" / "model.safetensors").items():
            assert torch.equal(opened.source.read(name), tensor)


def test_another_runs_checkpoint_needs_a_configuration(models: Path, tmp_path: Path) -> None:
    other = without_config(models, tmp_path)
    with pytest.raises(UserError, match=r"iter_0000007 carries no .*model\.student_hf_config"):
        open_checkpoint(other, hf_setting="model.student_hf_config")
    opened = open_checkpoint(other, hf_config=models / "hf")
    assert opened.source.hf_folder == models / "hf"
    assert torch.equal(
        opened.source.read("model.norm.weight"),
        load_file(models / "hf" / "model.safetensors")["model.norm.weight"],
    )


def test_the_configuration_has_to_be_of_the_model(models: Path, tmp_path: Path) -> None:
    other = without_config(models, tmp_path)
    large = copy_with_config(models / "hf", tmp_path / "large", vocab_size=129)
    with pytest.raises(
        UserError, match=r"embedding of 128 rows, but .*large/config.json says .* 129"
    ):
        open_checkpoint(other, hf_config=large)
    wide = copy_with_config(models / "hf", tmp_path / "wide", intermediate_size=80)
    with pytest.raises(
        UserError, match=r"fc1.* \[4, 128, 32\]; its configuration says \[4, 160, 32\]"
    ):
        open_checkpoint(other, hf_config=wide)
    with pytest.raises(UserError, match=r"--hf-config .* has no effect, because .*hf is a Hugging"):
        open_checkpoint(models / "hf", hf_config=wide)


def test_a_folder_that_is_no_checkpoint(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a Hugging Face folder .* nor a Megatron"):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"missing.* it does not exist"):
        open_checkpoint(tmp_path / "missing")
    (tmp_path / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(UserError, match=r"iter_0000001 .*it has the legacy format torch"):
        open_checkpoint(tmp_path)
