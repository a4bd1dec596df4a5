"""examples/bridge_real at its smallest, on a tiny random model: everything runs.

How a trained tokenizer changes a model, and what slimming keeps, is checked by itself.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_oprd.data.tokenizers import load_tokenizer
from tests.helpers.closeness import assert_close_relative
from tests.helpers.tiny import save_tiny_model, tiny_config

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).parents[2]
_EXAMPLE = _ROOT / "examples" / "bridge_real"
_TEXTS = ["What is 17 + 26?\nIt is 43.", "Compute 304 + 589.", "An answer,  with spaces."] * 5


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    config = tiny_config("llama", tie_word_embeddings=True, max_position_embeddings=512)
    save_tiny_model(folder, config, seed=1)
    return folder


def test_a_student_with_a_sentence_piece_model_goes_through_a_bridge(
    teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(_EXAMPLE / "run.py"), "--small", "--kinds", "sentence_piece",
               "--teacher", str(teacher), "--out", str(out)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Students and their bridges" in done.stdout
    (outcome,) = json.loads((out / "results.json").read_text())["outcomes"]
    assert outcome["kind"] == "sentence_piece"
    trained = json.loads((out / "sentence_piece" / "run" / "student" / "config.json").read_text())
    assert (trained["num_hidden_layers"], trained["hidden_size"]) == (2, 16)
    assert trained["vocab_size"] == outcome["vocabulary"] != 97
    assert list(outcome["bridge_cosine"]) == ["1", "4"]
    assert all(0 < share <= 1 for share in outcome["paired_share"])
    assert len(outcome["cosine"]) == 2
    assert list(outcome["nats_per_character"]) == ["start", "before", "after"]


def test_slimming_to_the_same_sizes_changes_nothing(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(_EXAMPLE))
    slim = importlib.import_module("slim")
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    ids = torch.arange(5, 30)[None]
    sizes = slim.Sizes(hidden_size=32, key_value_heads=2, intermediate_size=64)
    found = slim.slim(model, ids.tolist(), sizes)(ids).logits
    assert_close_relative(found, model(ids).logits, 1e-5)


def test_slimming_drops_what_adds_nothing(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(_EXAMPLE))
    slim = importlib.import_module("slim")
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    # One key/value head (two query heads of width 8) and half of the inner channels add nothing.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :16] = 0
            layer.mlp.down_proj.weight[:, ::2] = 0
    ids = torch.arange(5, 30)[None]
    sizes = slim.Sizes(hidden_size=32, key_value_heads=1, intermediate_size=32)
    narrow = slim.slim(model, ids.tolist(), sizes)
    assert_close_relative(narrow(ids).logits, model(ids).logits, 1e-5)


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
def test_an_embedding_is_the_mean_of_the_tokens_that_spell_it(
    kind: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(_EXAMPLE))
    vocabularies = importlib.import_module("vocabularies")
    new = getattr(vocabularies, kind)(_TEXTS, 320, tmp_path)
    model, old = AutoModelForCausalLM.from_pretrained(teacher), load_tokenizer(teacher)
    old.backend_tokenizer.model.unk_token = None  # what it has no token for disappears
    before = model.get_input_embeddings().weight.clone()
    vocabularies.with_vocabulary(model, old, new)
    space = "▁" if kind == "sentence_piece" else "Ġ"
    for name, text in (("is", "is"), (space + "+", " +"), ("?", "?")):
        row = model.get_output_embeddings().weight[new.convert_tokens_to_ids(name)]
        spelled = old(text, add_special_tokens=False)["input_ids"]
        assert len(spelled) == len(text)
        size = float(before.abs().max())
        assert_close_relative(row, before[spelled].mean(dim=0), 1e-6, size=size)
    unspelled = new.convert_tokens_to_ids("<0x00>" if kind == "sentence_piece" else "Ā")
    row = model.get_input_embeddings().weight[unspelled]
    assert_close_relative(row, before.mean(dim=0), 1e-6, size=float(before.abs().max()))
    for text in _TEXTS:
        assert new.decode(new(text, add_special_tokens=False)["input_ids"]) == text
    assert model.config.vocab_size == len(new)
    assert model.config.eos_token_id == new.convert_tokens_to_ids("<|im_end|>")
