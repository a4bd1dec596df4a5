import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from checkpoint_tools.prune_checks import compare_logits
from checkpoint_tools.prune_depth import evenly_spaced_layers, main, prune_depth, pruned_config
from megatron_oprd.errors import UserError, run_entry_point
from megatron_oprd.weights.checksum import checksum
from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.helpers.closeness import assert_close_relative

pytestmark = pytest.mark.long

LAYERS = 6


def qwen3() -> Qwen3ForCausalLM:
    """Six layers, the last three of them with a sliding window."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, tie_word_embeddings=True,
        use_sliding_window=True, sliding_window=3, max_window_layers=3,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def qwen3_moe() -> Qwen3MoeForCausalLM:
    """Six layers, layers 1 and 4 of them dense."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1, 4],
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def saved(folder: Path, **config: object) -> Path:
    """The folder of the Qwen3 model, with these fields of its config.json changed."""
    qwen3().save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_evenly_spaced_layers() -> None:
    assert evenly_spaced_layers(30, 24) == [
        0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 13, 14, 15, 16, 18, 19, 20, 21, 23, 24, 25, 26, 28, 29,
    ]  # fmt: skip
    assert evenly_spaced_layers(8, 3) == [0, 4, 7]  # 3.5 -> 4
    assert evenly_spaced_layers(6, 3) == [0, 2, 5]  # 2.5 -> 2
    assert evenly_spaced_layers(5, 2) == [0, 4]
    assert evenly_spaced_layers(5, 1) == [0]
    for num_layers in range(1, 40):
        assert evenly_spaced_layers(num_layers, num_layers) == list(range(num_layers))
        for keep in range(2, num_layers + 1):
            chosen = evenly_spaced_layers(num_layers, keep)
            gaps = [b - a for a, b in itertools.pairwise(chosen)]
            assert len(chosen) == keep
            assert (chosen[0], chosen[-1]) == (0, num_layers - 1)
            assert min(gaps) >= 1
            assert max(gaps) - min(gaps) <= 2
    for keep in (0, 6):
        with pytest.raises(UserError, match=r"the model has 5 layers; give 1\.\.5"):
            evenly_spaced_layers(5, keep)


@pytest.mark.parametrize(
    ("build", "keep"),
    [
        (qwen3, [0, 2, 4, 5]),
        (qwen3, [3]),
        (qwen3, list(range(LAYERS))),
        (qwen3_moe, [0, 2, 4, 5]),
        pytest.param(qwen3_moe, [3], marks=pytest.mark.slow),
        pytest.param(qwen3_moe, list(range(LAYERS)), marks=pytest.mark.slow),
    ],
)
def test_equals_the_model_with_layers_taken_out(
    tmp_path: Path, build: Callable[[], PreTrainedModel], keep: list[int]
) -> None:
    model = build()
    model.save_pretrained(tmp_path / "hf", max_shard_size="8KB")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")

    prune_depth(tmp_path / "hf", tmp_path / "out", keep, force=False)

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.num_hidden_layers == len(keep)
    kept = [model.config.layer_types[i] for i in keep] if model.config.model_type == "qwen3" else []
    assert not kept or loaded.config.layer_types == kept
    for new, old in enumerate(keep):
        expected = model.model.layers[old].state_dict()
        got = loaded.model.layers[new].state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    for part in ("embed_tokens", "norm"):
        assert torch.equal(getattr(loaded.model, part).weight, getattr(model.model, part).weight)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"

    # The kept layers of the loaded whole model, run one after the other, are the same function.
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[i] for i in keep])
    for new, layer in enumerate(whole.model.layers):
        layer.self_attn.layer_idx = new
    whole.config.num_hidden_layers = len(keep)
    if kept:
        whole.config.layer_types = kept
    tokens = torch.arange(10)[None] % 40
    with torch.no_grad():
        assert_close_relative(loaded(tokens).logits, whole(tokens).logits, 1e-5)


def test_logits_are_compared_with_the_layers_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = HFCheckpoint(saved(tmp_path / "hf"))
    config = pruned_config(source, [0, 2, 4, 5])
    assert "logits of 16 tokens are those" in compare_logits(source, config, [0, 2, 4, 5])
    # Layer 2, which sees everything, with layer 4's sliding window.
    config["layer_types"][1] = "sliding_attention"
    with pytest.raises(UserError, match=r"layers \[0, 2, 4, 5\] are off by"):
        compare_logits(source, config, [0, 2, 4, 5])
    prune_depth(tmp_path / "hf", tmp_path / "out", [0, 2], force=False)
    assert "logits of 16 tokens are those" in capsys.readouterr().err


def test_logits_that_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HFCheckpoint(saved(tmp_path / "hf"))
    config = pruned_config(source, [0, 2])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert "0.0 GB are free" in compare_logits(source, config, [0, 2])
    unknown = HFCheckpoint(saved(tmp_path / "unknown", model_type="no_such_model"))
    assert "transformers has no no_such_model" in compare_logits(unknown, config, [0, 2])


def test_everything_else_of_the_config_stays(tmp_path: Path) -> None:
    saved(tmp_path / "hf", max_window_layers=3, first_k_dense_replace=None, eos_token_id=[1] * 6)
    before = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert len(before["layer_types"]) == LAYERS

    prune_depth(tmp_path / "hf", tmp_path / "out", [0, 1, 4], force=False)

    assert json.loads((tmp_path / "out" / "config.json").read_text()) == before | {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "max_window_layers": 2,
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_types": ["full_attention"] * 5}, r"layer_types has 5 entries for 6 layers"),
        ({"decoder_sparse_step": 2}, r"decoder_sparse_step=2 depends on"),
        ({"num_layers": 12}, r"num_layers=12 depends on"),
        ({"cross_attention_layers": [1, 3]}, r"cross_attention_layers=\[1, 3\] depends on"),
        ({"quantization_config": {"skip": ["model.layers.3.mlp"]}}, r"quantization_config\.skip"),
        ({"num_hidden_layers": 7, "layer_types": None}, r"=7, but .* exist for 6 layers, up to la"),
        ({"num_hidden_layers": 5, "layer_types": None}, r"=5, but .* exist for 6 layers, up to la"),
        ({"num_hidden_layers": None}, r"has no num_hidden_layers at its top level"),
    ],
)
def test_configs_it_cannot_translate(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    saved(tmp_path / "hf", **config)
    with pytest.raises(UserError, match=message):
        prune_depth(tmp_path / "hf", tmp_path / "out", [0, 3], force=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("0,1,6", r"--keep 0,1,6 has layer 6.*; its layers are 0\.\.5"),
        ("0,-1", r"--keep 0,-1 has layer -1"),
        ("0,2,2", r"--keep 0,2,2 .*ascending order"),
        ("2,0", r"--keep 2,0 .*ascending order"),
    ],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_wrong_keep(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    keep: str,
    message: str,
    dry_run: list[str],
) -> None:
    hf = str(saved(tmp_path / "hf"))
    arguments = ["--hf", hf, "--out", str(tmp_path / "out"), f"--keep={keep}", *dry_run]
    with pytest.raises(UserError, match=message):
        main(arguments)
    with pytest.raises(SystemExit) as exit_info:
        run_entry_point(lambda: main(arguments))
    assert exit_info.value.code == 2
    assert "error: --keep " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_empty_keep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--keep .*at least one"):
        prune_depth(saved(tmp_path / "hf"), tmp_path / "out", [], force=False)


@pytest.mark.parametrize("choice", [[], ["--keep", "0,x"], ["--keep", "0", "--num-layers", "2"]])
def test_wrong_arguments_exit_2(tmp_path: Path, choice: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--hf", str(tmp_path), "--out", str(tmp_path / "out"), *choice])
    assert exit_info.value.code == 2


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, out = saved(tmp_path / "hf"), tmp_path / "out"
    arguments = ["--hf", str(hf), "--out", str(out), "--num-layers", "3"]

    assert main([*arguments, "--dry-run"]) == 0
    promised = capsys.readouterr().out
    assert not out.exists()
    assert main(arguments) == 0
    said = capsys.readouterr().out

    model = qwen3()
    size = sum(
        tensor.nbytes
        for part in (model.model.embed_tokens, model.model.norm, *(model.model.layers[:3]))
        for tensor in part.state_dict().values()
    )
    count = len(HFCheckpoint(out).names())
    assert count == 2 + 3 * len(model.model.layers[0].state_dict())
    assert said == f"{out}: {count} tensors, {size} bytes\n"
    assert (
        promised == f"layers kept: 0,2,5 of 6\nwould write {out}: {count} tensors, {size} bytes\n"
    )

    for extra in ([], ["--dry-run"]):
        with pytest.raises(UserError, match="is not empty"):
            main([*arguments, *extra])
    assert main([*arguments[:-1], "2", "--force"]) == 0
    assert HFCheckpoint(out).config["num_hidden_layers"] == 2


def test_manifest_and_shards(tmp_path: Path) -> None:
    hf, out = saved(tmp_path / "hf"), tmp_path / "out"
    arguments = ["--hf", str(hf), "--out", str(out), "--keep", "0,3"]
    assert main([*arguments, "--max-shard-size", "4KB"]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["tool"], manifest["layers_kept"]) == ("prune_depth", [0, 3])
    files = [hf / "config.json", hf / "model.safetensors"]
    sizes = {str(file): file.stat().st_size for file in files}
    assert {file: size for file, (size, _) in manifest["source"].items()} == sizes
    pruned = HFCheckpoint(out)
    assert manifest["checksums_xxh3_128"] == {n: checksum(pruned.read(n)) for n in pruned.names()}
    # The manifest describes this folder, and is not carried on.
    assert main(["--hf", str(out), "--out", str(tmp_path / "again"), "--keep", "1"]) == 0
    manifest = json.loads((tmp_path / "again" / "manifest.json").read_text())
    assert manifest["layers_kept"] == [1]


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: list[str]) -> None:
    hf = saved(tmp_path / "hf")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"out needs [\d,]+ bytes; the file system .* 1,000 bytes"):
        main(["--hf", str(hf), "--out", str(tmp_path / "out"), "--keep", "0", *dry_run])
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
