"""Models that are evaluated with one vLLM server, a stand-in, one after the other."""

import json
import shlex
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_oprd import evaluate
from megatron_oprd.errors import UserError
from tests.data.test_benchmarks import row, write
from tests.fakes.vllm_server import FakeServer
from tests.helpers.tiny import save_tiny_model, tiny_config


def run(monkeypatch: pytest.MonkeyPatch, root: Path, options: str) -> None:
    arguments = (
        f"--data {root}/sums.jsonl --n 2 --max-new-tokens 3 --batch-size 4 --device cpu "
        f"--output {root}/out {options}"
    )
    monkeypatch.setattr(sys, "argv", ["evaluate", *shlex.split(arguments)])
    assert evaluate.main() == 0


def test_each_model_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("a", "b")):
        save_tiny_model(tmp_path / name, tiny_config("llama"), seed=seed)
    write(tmp_path / "sums.jsonl", [row(f"{a}+{a}", str(2 * a)) for a in range(3)])
    config = json.loads(tiny_config("llama").to_json_string(use_diff=False))
    with closing(FakeServer(config)) as server:
        both = f"--model {tmp_path}/a {tmp_path}/b"
        run(monkeypatch, tmp_path, f"{both} --engine vllm --server-url {server.url}")
        assert server.num_syncs == 2
        for name, tensor in load_file(tmp_path / "b" / "model.safetensors").items():
            assert torch.equal(server.weights[name], tensor)
        for name in ("a", "b"):
            lines = (tmp_path / "out" / "samples" / name / "sums.jsonl").read_text().splitlines()
            assert len(lines) == 6
        server.config["hidden_size"] = 64
        with pytest.raises(UserError, match="model has hidden_size = 64"):
            run(monkeypatch, tmp_path, f"{both} --engine vllm --server-url {server.url}")
        assert server.num_syncs == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--server-url http://127.0.0.1:1", "--server-url .* --engine hf; .*vllm"),
        ("--engine vllm --server-url localhost:1", "--server-url = localhost:1 "),
    ],
)
def test_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(monkeypatch, tmp_path, f"--model {tmp_path} {options}")
