"""Hugging Face -> Megatron -> Hugging Face."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from checkpoint_tools.hf_to_megatron import main as to_megatron
from checkpoint_tools.megatron_to_hf import main, megatron_to_hf
from megatron_oprd.errors import UserError
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.helpers.tiny import save_tiny_model, tiny_config
from tests.helpers.torch_dist import save_torch_dist

pytestmark = pytest.mark.long

SMOLLM2 = Path(__file__).parents[2] / ".cache" / "smollm2" / "SmolLM2-135M-Instruct"
MODELS: dict[str, dict[str, Any]] = {
    "llama_mha": {"family": "llama", "num_key_value_heads": 4, "vocab_size": 101},
    "llama_mqa_tied": {"family": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "mistral": {"family": "mistral", "num_attention_heads": 8, "num_hidden_layers": 5},
    "qwen2": {"family": "qwen2", "vocab_size": 131},
    "qwen2_tied": {"family": "qwen2", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "num_hidden_layers": 7},
    "phi3": {"family": "phi3"},
    "phi3_tied": {"family": "phi3", "num_attention_heads": 8, "tie_word_embeddings": True},
    "moe": {"family": "qwen3_moe", "vocab_size": 99},
    # Unequal layers: the first without experts; linear attention in some.
    "latent": {"family": "deepseek_v3", "vocab_size": 99},
    "linear": {"family": "qwen3_next", "vocab_size": 101},
    "sinks": {"family": "gpt_oss"},
    "linear_dense": {"family": "qwen3_5_text"},
}
# Mixtures of experts.
EXPERTS = ("moe", "latent", "linear", "sinks")
# (tensor, pipeline, expert, expert tensor)
LAYOUTS = [(1, 1, 1, 1), (2, 1, 1, 2), (2, 2, 2, 1), (4, 4, 2, 4), (1, 3, 4, 2)]
# Every model in two layouts, two models in every layout; the rest is left to the nightly run.
ROUND_TRIPS = [
    pytest.param(
        name,
        layout,
        marks=[pytest.mark.slow]
        * (name not in ("llama_mha", "moe") and layout not in ((2, 2, 2, 1), (4, 4, 2, 4))),
        id=f"{name}-{layout}",
    )
    for name in MODELS
    for layout in LAYOUTS
    # Megatron does not divide experts with biases.
    if name != "sinks" or layout[3] == 1
]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("megatron_to_hf")
    for seed, (name, fields) in enumerate(MODELS.items()):
        save_tiny_model(root / name, tiny_config(**fields), seed=seed)
        config = root / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text())))  # on one line
    return root


def settings(
    layout: tuple[int, int, int, int], *, experts: bool = False, **others: Any
) -> Settings:
    tensor, pipeline, expert, expert_tensor = layout
    sizes: dict[str, Any] = {
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": expert_tensor,
    }
    return Settings(
        layout=ParallelLayout(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            **(sizes if experts else {}),
        ),
        **others,
    )


def round_trip(model: Path, tmp_path: Path, using: Settings, **options: Any) -> Path:
    hf_to_megatron(model, tmp_path / "megatron", using)
    return megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", **options)


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = HFCheckpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def changed(model: Path, tmp_path: Path, **changes: Tensor) -> Path:
    """A copy of a model with tensors changed or added."""
    folder = shutil.copytree(model, tmp_path / "changed")
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("name", "layout"), ROUND_TRIPS)
def test_nothing_changes(
    models: Path, tmp_path: Path, name: str, layout: tuple[int, int, int, int]
) -> None:
    model = models / name
    out = round_trip(model, tmp_path, settings(layout, experts=name in EXPERTS))
    assert_same(weights(out), weights(model))
    companions = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert companions <= {file.name for file in out.iterdir()}
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_each_tensor_keeps_its_dtype(models: Path, tmp_path: Path) -> None:
    """Megatron has one dtype for query, key and value of all layers; the widest is exact."""
    tensors = weights(models / "qwen3")
    mixed = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    for name in ("model.norm.weight", "model.layers.2.self_attn.k_proj.weight"):
        mixed[name] = tensors[name]
    mixed["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].half()
    model = changed(models / "qwen3", tmp_path, **mixed)
    assert_same(weights(round_trip(model, tmp_path, settings((2, 1, 1, 1)))), weights(model))


def test_a_tied_head_that_is_stored_comes_back(models: Path, tmp_path: Path) -> None:
    embedding = weights(models / "qwen2_tied")["model.embed_tokens.weight"]
    model = changed(models / "qwen2_tied", tmp_path, **{"lm_head.weight": embedding})
    assert "lm_head.weight" in weights(model)
    assert_same(weights(round_trip(model, tmp_path, settings((2, 2, 1, 1)))), weights(model))


def test_a_tied_head_that_differs_is_refused(models: Path, tmp_path: Path) -> None:
    embedding = weights(models / "qwen2_tied")["model.embed_tokens.weight"]
    model = changed(models / "qwen2_tied", tmp_path, **{"lm_head.weight": embedding * 2})
    for more in ([], ["--dry-run"]):
        with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens"):
            to_megatron(["--hf", str(model), "--out", str(tmp_path / "megatron"), *more])
    assert not (tmp_path / "megatron").exists()

    # A Megatron checkpoint of an untied model with the configuration of a tied one.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    untied = hf_to_megatron(model, tmp_path / "untied", Settings())
    shutil.copy(models / "qwen2_tied/config.json", untied / "release/hf")
    (untied / "manifest.json").unlink()
    for more in ([], ["--dry-run"]):
        with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens"):
            run("--megatron", untied, "--out", tmp_path / "hf", *more)
    assert not (tmp_path / "hf").exists()


def test_what_the_configuration_says_is_no_weight(models: Path, tmp_path: Path) -> None:
    """Old versions of transformers stored frequencies, which are computed today."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    model = changed(models / "llama_mha", tmp_path, **{name: torch.ones(4)})
    out = round_trip(model, tmp_path, Settings())
    assert_same(weights(out), weights(models / "llama_mha"))


def test_a_dtype_for_the_checkpoint(models: Path, tmp_path: Path) -> None:
    out = round_trip(models / "qwen2", tmp_path, settings((2, 1, 1, 1), dtype=torch.bfloat16))
    expected = weights(models / "qwen2")
    assert_same(weights(out), {name: tensor.bfloat16() for name, tensor in expected.items()})
    config = json.loads((models / "qwen2" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert json.loads((out / "config.json").read_text()) == {**config, "dtype": "bfloat16"}


def test_a_dtype_for_the_export(models: Path, tmp_path: Path) -> None:
    out = round_trip(models / "qwen2", tmp_path, Settings(), dtype=torch.float16)
    expected = weights(models / "qwen2")
    assert_same(weights(out), {name: tensor.half() for name, tensor in expected.items()})
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"


def test_shards_of_a_size(models: Path, tmp_path: Path) -> None:
    out = round_trip(
        models / "moe", tmp_path, settings((2, 1, 2, 1), experts=True), max_shard_size=40_000
    )
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(shards) > 5
    assert all((out / name).stat().st_size < 50_000 for name in shards)
    assert (out / "model.safetensors.index.json").is_file()
    found, expected = weights(out), weights(models / "moe")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_training_checkpoint_gives_the_students_weights(models: Path, tmp_path: Path) -> None:
    """Beside optimizer states, in the newest step of a run; no manifest of a conversion."""
    hf_to_megatron(models / "qwen3", tmp_path / "megatron", Settings())
    step = tmp_path / "run" / "checkpoints" / "step_0000004"
    shutil.copytree(tmp_path / "megatron" / "release", step)
    shutil.copytree(tmp_path / "megatron" / "release", step.with_name("step_0000003"))
    (step / "manifest.json").write_text('{"step": 4, "student": {}}')
    expected = weights(models / "qwen3")
    found = weights(megatron_to_hf(tmp_path / "run", tmp_path / "hf"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_command_line(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_to_megatron(models / "phi3", tmp_path / "megatron", Settings())
    shutil.move(tmp_path / "megatron" / "release" / "hf", tmp_path / "config")
    arguments = ["--megatron", tmp_path / "megatron", "--out", tmp_path / "hf"]
    with pytest.raises(UserError, match=r"release carries no Hugging Face .* with --hf-config"):
        run(*arguments)
    arguments += ["--hf-config", tmp_path / "config", "--max-shard-size", "100KB"]
    assert run(*arguments, "--dry-run") == 0
    assert not (tmp_path / "hf").exists()
    size = HFCheckpoint(models / "phi3").num_bytes()
    assert f"27 tensors in 2 files, {size} bytes" in capsys.readouterr().out
    assert run(*arguments) == 0
    assert_same_content(tmp_path / "hf", models / "phi3")
    with pytest.raises(UserError, match=r"hf is not empty; .*--force"):
        run(*arguments)
    assert run(*arguments, "--force", "--dtype", "bfloat16") == 0
    assert {t.dtype for t in weights(tmp_path / "hf").values()} == {torch.bfloat16}


def assert_same_content(found: Path, expected: Path) -> None:
    tensors = weights(expected)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in weights(found).items())
    assert HFCheckpoint(found).config == HFCheckpoint(expected).config


@pytest.mark.parametrize("size", ["", "5 apples", "0GB", "-1MB", "1e3"])
def test_sizes_that_are_none(tmp_path: Path, size: str) -> None:
    with pytest.raises(SystemExit):
        run("--megatron", tmp_path, "--out", tmp_path / "hf", f"--max-shard-size={size}")


def test_what_is_no_megatron_checkpoint(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--megatron .*qwen2 is not a Megatron"):
        megatron_to_hf(models / "qwen2", tmp_path / "hf")
    with pytest.raises(UserError, match=r"--megatron .*nothing does not exist"):
        megatron_to_hf(tmp_path / "nothing", tmp_path / "hf")
    save_torch_dist(tmp_path / "other", {"encoder.weight": torch.ones(3)})
    with pytest.raises(UserError, match="it is no GPT model"):
        megatron_to_hf(tmp_path / "other", tmp_path / "hf", hf_config=models / "qwen2")


@pytest.mark.slow  # the same with a real model
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="make demo downloads SmolLM2")
def test_smollm2(tmp_path: Path) -> None:
    out = round_trip(SMOLLM2, tmp_path, settings((1, 2, 1, 1)))
    found, expected = HFCheckpoint(out), HFCheckpoint(SMOLLM2)
    assert found.names() == expected.names()
    for name in expected.names():
        assert torch.equal(found.read(name), expected.read(name)), name
    for file in SMOLLM2.iterdir():
        # A manifest says where its own folder comes from.
        if file.suffix == ".json" and file.name != "manifest.json":
            assert json.loads((out / file.name).read_text()) == json.loads(file.read_text())
