"""The decoder in the folder of a model that also sees images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from checkpoint_tools.hidden_states import transformers_states
from checkpoint_tools.inspect import inspect
from checkpoint_tools.megatron_to_hf import main as megatron_to_hf
from checkpoint_tools.verify import main as verify
from megatron_oprd.errors import UserError
from megatron_oprd.models.families import read_architecture
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights.hf_files import HFFolder
from tests.helpers.tiny import copy_with_config, save_tiny_model, tiny_config, with_vision

pytestmark = pytest.mark.long

INNER = "language_model."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nested")
    for family in ("mistral", "ministral3", "gemma3_text"):
        save_tiny_model(root / family, with_vision(tiny_config(family)), seed=3)
        (root / family / "preprocessor_config.json").write_text("{}")
    return root


def decoder_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(INNER): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(INNER)
    }


@pytest.mark.parametrize("family", ["mistral", "ministral3", "gemma3_text"])
def test_the_decoder_is_a_model_of_its_own(
    models: Path, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    opened = open_checkpoint(models / family)
    opened.check_tensors()
    expected = decoder_of(models / family)
    assert sorted(opened.source.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(opened.source.read(name), tensor)
        assert opened.source.shape(name) == tensor.shape
    left_out = len(load_file(models / family / "model.safetensors")) - len(expected)
    assert f"{left_out} tensors of its other parts" in caplog.text
    # What transformers builds of the written configuration has the decoder's numbers.
    config = AutoConfig.from_pretrained(opened.source.hf_folder)
    assert config.to_dict() == tiny_config(family).to_dict() | {
        "architectures": config.architectures,
        "dtype": "float32",
        "_name_or_path": str(opened.source.hf_folder),
    }
    names = [path.name for path in opened.source.companion_files()]
    assert "tokenizer.json" in names
    assert "preprocessor_config.json" not in names


def test_through_megatron_and_back(models: Path, tmp_path: Path) -> None:
    """The export is a plain model with the decoder's tensors, and transformers opens it."""
    hf_to_megatron(models / "mistral", tmp_path / "megatron", Settings())
    back = tmp_path / "back"
    assert megatron_to_hf(["--megatron", str(tmp_path / "megatron"), "--out", str(back)]) == 0
    exported, expected = load_file(back / "model.safetensors"), decoder_of(models / "mistral")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    model, found = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert type(model).__name__ == "MistralForCausalLM"
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert verify([str(models / "mistral"), str(back), "--level", "bitwise"]) == 0
    one, other = (
        transformers_states(folder, [[5, 6, 7]], device=torch.device("cpu"))
        for folder in (models / "mistral", back)
    )
    assert torch.equal(one.logits[0], other.logits[0])
    assert len(one.layers) == 4


def test_inspect_shows_the_decoder(models: Path) -> None:
    found = inspect(models / "ministral3", ParallelLayout())
    assert found.architecture is not None
    assert found.architecture.family == "Ministral3ForCausalLM"
    assert sum(part.num_tensors for part in found.parts) == len(decoder_of(models / "ministral3"))


def test_sequences_end_where_queries_are_scaled(models: Path, tmp_path: Path) -> None:
    """Where nothing scales them, they may be as long as YaRN makes them."""
    found = read_architecture(HFFolder(models / "ministral3"))
    assert found.max_position_embeddings == 64
    assert found.length_field.startswith("rope_parameters.original_max_position_embeddings, past")
    text = HFFolder(models / "ministral3").config["text_config"]
    rope = text["rope_parameters"] | {"llama_4_scaling_beta": 0.0}
    unscaled = copy_with_config(
        models / "ministral3", tmp_path / "unscaled", text_config=text | {"rope_parameters": rope}
    )
    found = read_architecture(HFFolder(unscaled))
    assert (found.max_position_embeddings, found.length_field) == (256, "max_position_embeddings")


def test_the_growth_of_the_scale_is_needed(models: Path, tmp_path: Path) -> None:
    text = HFFolder(models / "ministral3").config["text_config"]
    rope = {k: v for k, v in text["rope_parameters"].items() if k != "llama_4_scaling_beta"}
    folder = copy_with_config(
        models / "ministral3", tmp_path / "other", text_config=text | {"rope_parameters": rope}
    )
    with pytest.raises(UserError, match="rope_parameters has no llama_4_scaling_beta; give a num"):
        read_architecture(HFFolder(folder))


@pytest.mark.parametrize(
    ("fields", "of_text", "message"),
    [
        ({"tie_word_embeddings": True}, {}, "tie_word_embeddings = True, but text_config's is F"),
        ({"projector_scale": 2.0}, {}, "has the field 'projector_scale'"),
        ({"model_type": "llava"}, {}, "model_type = 'llava' does not fit Mistral3"),
        ({"text_config": None}, {}, "text_config = None has to be an object"),
        ({}, {"model_type": "mistral4"}, "model_type = 'mistral4'; supported are mistral, min"),
        ({}, {"hidden_act": "gelu"}, r"\(text_config\) has hidden_act = 'gelu'"),
        ({}, {"query_scale": 2.0}, r"\(text_config\) has the field 'query_scale'"),
    ],
)
def test_refused(
    models: Path, tmp_path: Path, fields: dict[str, Any], of_text: dict[str, Any], message: str
) -> None:
    text = HFFolder(models / "mistral").config["text_config"] | of_text
    folder = copy_with_config(
        models / "mistral", tmp_path / "other", **({"text_config": text} | fields)
    )
    with pytest.raises(UserError, match=message):
        read_architecture(HFFolder(folder))


def test_a_tensor_of_no_part_is_left_over(models: Path, tmp_path: Path) -> None:
    folder = copy_with_config(models / "mistral", tmp_path / "other")
    tensors = load_file(folder / "model.safetensors") | {"audio_tower.weight": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"left over: audio_tower\.weight"):
        open_checkpoint(folder).check_tensors()


def test_qwens_decoder_as_published(tmp_path: Path) -> None:
    """With its experts stacked, beside layers that predict further tokens."""
    config = with_vision(tiny_config("qwen3_5_moe_text"))
    save_tiny_model(tmp_path / "single", config, seed=0)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "published", save_original_format=False)
    tensors = load_file(tmp_path / "published" / "model.safetensors")
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in tensors
    further = {"mtp.fc.weight": torch.ones(2, 2)}
    save_file(tensors | further, tmp_path / "published" / "model.safetensors", {"format": "pt"})
    found, expected = (open_checkpoint(tmp_path / one) for one in ("published", "single"))
    found.check_tensors()
    assert found.architecture.family == "Qwen3_5MoeForCausalLM"
    assert sorted(found.source.names()) == sorted(expected.source.names())
    for name in expected.source.names():
        assert torch.equal(found.source.read(name), expected.source.read(name)), name


@pytest.fixture(params=["qwen3_5_text", "qwen3_5_moe_text"])
def saved_decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A whole model, and beside it its decoder as transformers reads and saves it."""
    save_tiny_model(tmp_path / "whole", with_vision(tiny_config(request.param)), seed=4)
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_bytes(
        (tmp_path / "whole" / "tokenizer.json").read_bytes()
    )
    return tmp_path


def test_a_saved_decoder_keeps_longer_names(saved_decoder: Path) -> None:
    """It is the decoder of the whole folder, and the plain names are those of its export."""
    names = load_file(saved_decoder / "saved" / "model.safetensors").keys()
    assert any(name.startswith("model.language_model.layers.") for name in names)
    whole, saved = (open_checkpoint(saved_decoder / one) for one in ("whole", "saved"))
    saved.check_tensors()
    assert saved.architecture == whole.architecture
    assert sorted(saved.source.names()) == sorted(whole.source.names())
    for name in whole.source.names():
        assert torch.equal(saved.source.read(name), whole.source.read(name)), name
    hf_to_megatron(saved_decoder / "saved", saved_decoder / "megatron", Settings())
    back = saved_decoder / "back"
    assert megatron_to_hf(["--megatron", str(saved_decoder / "megatron"), "--out", str(back)]) == 0
    assert not any("language_model" in name for name in load_file(back / "model.safetensors"))
    assert verify([str(saved_decoder / "saved"), str(back), "--level", "bitwise"]) == 0
    one, other = (
        transformers_states(folder, [[5, 6, 7]], device=torch.device("cpu"))
        for folder in (saved_decoder / "saved", back)
    )
    assert torch.equal(one.logits[0], other.logits[0])


def test_both_names_of_a_tensor(saved_decoder: Path) -> None:
    file = saved_decoder / "saved" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.language_model.norm.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"left over: model\.language_model"):
        open_checkpoint(saved_decoder / "saved").check_tensors()


def test_a_megatron_checkpoint_needs_the_decoders_configuration(
    models: Path, tmp_path: Path
) -> None:
    hf_to_megatron(models / "mistral", tmp_path / "megatron", Settings())
    folder = tmp_path / "megatron" / "release"
    for file in (folder / "hf").iterdir():
        file.unlink()
    (folder / "hf").rmdir()
    with pytest.raises(UserError, match="give the configuration of the decoder"):
        open_checkpoint(tmp_path / "megatron", hf_config=models / "mistral")
