"""The evaluation on benchmarks with vLLM: as with transformers where nothing is drawn."""

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_oprd import evaluate
from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.errors import UserError
from megatron_oprd.rollout.vllm import kind
from tests.data.test_benchmarks import row, write
from tests.helpers.tiny import save_tiny_model, tiny_config
from tests.vllm.engines import SETTINGS

pytestmark = pytest.mark.slow

SPLIT = "--tensor-model-parallel-size"


def run(monkeypatch: pytest.MonkeyPatch, root: Path, output: str, options: str) -> dict[str, Any]:
    arguments = (
        f"--model {root}/model --data {root}/sums.jsonl --n 1 --temperature 0 --max-new-tokens 8 "
        f"--batch-size 4 --device cpu --output {root / output} {options}"
    )
    monkeypatch.setattr(sys, "argv", ["evaluate", *shlex.split(arguments)])
    assert evaluate.main() == 0
    return json.loads((root / output / "evaluation.json").read_text())


def test_greedy_responses_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    save_tiny_model(tmp_path / "model", tiny_config("llama", **fields), seed=1)
    monkeypatch.setattr(kind, "VLLMConfig", partial(VLLMConfig, **SETTINGS))
    write(tmp_path / "sums.jsonl", [row(f"{a}+{a}", str(2 * a)) for a in range(6)])
    found = {engine: run(monkeypatch, tmp_path, engine, f"--engine {engine}") for engine in
             ("hf", "vllm")}  # fmt: skip
    assert found["vllm"]["results"] == found["hf"]["results"]
    samples = {
        engine: (tmp_path / engine / "samples/model/sums.jsonl").read_text() for engine in found
    }
    assert samples["vllm"] == samples["hf"]
    split = run(monkeypatch, tmp_path, "split", f"--engine vllm {SPLIT} 2")
    assert split["results"] == found["hf"]["results"]
    with pytest.raises(UserError, match=rf"{SPLIT} 3 does not divide the 4 attention heads of mod"):
        run(monkeypatch, tmp_path, "split", f"--engine vllm {SPLIT} 3")
    with pytest.raises(UserError, match=f"{SPLIT} 2 needs --engine vllm without"):
        run(monkeypatch, tmp_path, "split", f"--engine hf {SPLIT} 2")
    with pytest.raises(UserError, match="engine"):
        run(monkeypatch, tmp_path, "hf", "--engine vllm")
