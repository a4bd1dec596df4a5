import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, GPT2Config
from transformers.core_model_loading import revert_weight_conversion

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from checkpoint_tools.inspect import inspect, main
from checkpoint_tools.obstacles import find_obstacles
from megatron_oprd.errors import UserError
from megatron_oprd.models.families import FAMILIES
from megatron_oprd.parallel.layout import ParallelLayout
from tests.helpers.ranks import ROOT, rank_environment
from tests.helpers.tiny import copy_with_config, save_tiny_model, tiny_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    save_tiny_model(root / "hf", tiny_config("qwen3_moe"), seed=0, dtype=torch.bfloat16)
    settings = Settings(make_vocab_size_divisible_by=8)
    hf_to_megatron(root / "hf", root / "megatron", settings)
    return root


LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]


def test_both_formats_are_the_same_model(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = {}
    for name in ("hf", "megatron"):
        file = tmp_path / f"{name}.json"
        assert main([str(folders / name), *LAYOUT, "--json", str(file), "--tensors"]) == 0
        reports[name] = json.loads(file.read_text())
    hf, megatron = reports["hf"], reports["megatron"]
    for field in ("architecture", "shares", "parts", "groups", "tensors"):
        assert hf[field] == megatron[field], field
    assert (hf["padded_vocab_size"], megatron["padded_vocab_size"]) == (97, 104)
    assert hf["layout_padded_vocab_size"] == 128
    assert hf["manifest"] is None
    assert megatron["manifest"]["tool"] == "hf_to_megatron"
    assert not any(key.startswith("checksums") for key in megatron["manifest"])
    said = capsys.readouterr().out
    assert "padded to 104 in this checkpoint" in said
    assert "model.layers.3.mlp.experts.7.up_proj.weight" in said
    assert "tensor_model_parallel_size 2, pipeline_model_parallel_size 2" in " ".join(said.split())


def test_groups_by_default(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folders / "hf")]) == 0
    said = capsys.readouterr().out
    assert "model.layers.{0-3}.mlp.experts.{0-7}.up_proj" in said
    assert "model.layers.3." not in said


def test_a_model_of_another_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    assert main([str(tmp_path / "gpt2")]) == 0
    said = capsys.readouterr().out
    assert "not supported here: " in said
    assert "transformer.h.{0-1}.attn.c_attn.weight" in said
    assert "Each rank's weights" not in said


def test_what_cannot_be_read(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        main([str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"5 .* 4 layers"):
        main([str(folders / "hf"), "--pipeline-model-parallel-size", "5"])
    virtual = ["--pipeline-model-parallel-size", "2", "--virtual-pipeline-model-parallel-size", "3"]
    with pytest.raises(
        UserError, match=r"-size 2 x --virtual-.* 3 .* 4 layers of .*hf; give sizes"
    ):
        main([str(folders / "hf"), *virtual])
    with pytest.raises(UserError, match=r"--json .*none/file .*none does not exist; make it"):
        main([str(tmp_path / "none"), "--json", str(tmp_path / "none/file")])


def test_the_module_does_not_stand_in_the_way_of_the_standard_library(folders: Path) -> None:
    """Python's own ``inspect`` has the same name."""
    process = subprocess.run(
        [sys.executable, "-m", "checkpoint_tools.inspect", str(folders / "hf")],
        env=rank_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "Qwen3MoeForCausalLM" in process.stdout


def test_what_stands_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cohere's has fields for what no family here does, and one norm for attention and MLP."""
    config = CohereConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "cohere")
    file = tmp_path / "report.json"
    assert main([str(tmp_path / "cohere"), "--json", str(file)]) == 0
    found = json.loads(file.read_text())["obstacles"]
    assert found["family"] == "GraniteForCausalLM"
    assert {"logit_scale", "layer_norm_eps"} <= set(found["fields"])
    assert "hidden_size" not in found["fields"]
    assert found["unknown_tensors"] == []
    assert found["missing_tensors"] == ["model.layers.*.post_attention_layernorm.weight"]
    said = capsys.readouterr().out
    assert f"compared with {found['family']}" in said
    assert "logit_scale = 0.0625" in said


def test_a_field_of_a_known_family_stands_in_the_way(tmp_path: Path) -> None:
    """All else is as the family has it."""
    save_tiny_model(tmp_path / "llama", tiny_config("llama"), seed=0)
    other = copy_with_config(tmp_path / "llama", tmp_path / "other", query_scale=2.0)
    found = inspect(other, ParallelLayout()).obstacles
    assert found is not None
    assert found.family == "LlamaForCausalLM"
    assert found.fields == {"query_scale": 2.0}
    assert found.unknown_tensors == found.missing_tensors == []
    assert inspect(tmp_path / "llama", ParallelLayout()).obstacles is None


@pytest.mark.parametrize("family", [family.model_type for family in FAMILIES.values()])
def test_a_family_is_its_own_closest(tmp_path: Path, family: str) -> None:
    """By its tensors alone, or one with the same tensors is."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    names = revert_weight_conversion(model, model.state_dict()).keys()
    found = find_obstacles({}, names)
    assert found.unknown_tensors == found.missing_tensors == []
