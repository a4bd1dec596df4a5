"""Rollouts from a vLLM server, against transformers' models with the same weights."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.errors import UserError
from megatron_oprd.models.families import read_architecture
from megatron_oprd.rollout.engine import RolloutEngineError, WrongWeightsError
from megatron_oprd.rollout.vllm.client import ServerClient, check_server
from megatron_oprd.rollout.vllm.launch import ServerProcess
from megatron_oprd.rollout.vllm.memory import num_blocks
from megatron_oprd.rollout.vllm.messages import EXTENSION
from megatron_oprd.rollout.vllm.secret import VARIABLE
from megatron_oprd.rollout.vllm.servers import VLLMServersEngine
from megatron_oprd.rollout.vllm.sync_check import SyncCheck
from megatron_oprd.rollout.vllm.transfers import transfer_config
from megatron_oprd.weights.hf_files import HFFolder
from tests.helpers.tiny import EOS_ID, save_tiny_model
from tests.vllm.engines import (
    SETTINGS,
    Weights,
    check_greedy,
    check_partial_sync,
    check_same_as_hf,
    logits_of,
    others,
    prompt,
    sampling,
    tiny_llama,
)

# vLLM caches prefixes of 128 tokens on a CPU; the last two share one.
PREFIX = [5 + i * 7 % 90 for i in range(140)]
PROMPTS = [prompt(3, 7, 8, 9, 10), prompt(0, 20), prompt(8, *PREFIX, 30), prompt(5, *PREFIX, 31)]
MEANINGLESS = (11, 96)
KNOWN = set(range(97)) - set(MEANINGLESS)
# `vllm serve` does the same, but asks for a package named vllm, which the CPU build's is not.
SERVE = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
KV_CACHE_BYTES = 250_000_000
OPTIONS = [
    *("--host", "127.0.0.1", "--enable-scale-out", "--worker-extension-cls", EXTENSION),
    *("--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--load-format", "dummy"),
    *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES)),
    *("--weight-transfer-config", transfer_config(False)),
]
SECONDS_TO_START = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    save_tiny_model(folder, tiny_llama(tie_word_embeddings=True), seed=0)
    return folder


@pytest.fixture(scope="module")
def weights(folder: Path) -> Weights:
    weights = load_file(folder / "model.safetensors")
    # A tied tiny model is sure that a token repeats; smaller logits are less so.
    weights["model.embed_tokens.weight"] *= 0.25
    return weights


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    # Bound but never listened on: while the server starts, no other test is given its port.
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    port = reserved.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [*SERVE, str(folder), "--port", str(port), *OPTIONS]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        ServerClient(url).wait(SECONDS_TO_START)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=60)
        reserved.close()


def start(
    url: str,
    folder: Path,
    *,
    owner: str = "runs/a",
    interval: int | None = 1,
    swaps: bool = False,
) -> VLLMServersEngine:
    return VLLMServersEngine(
        folder,
        dtype=torch.float32,
        eos_token_ids=[EOS_ID],
        known_ids=KNOWN,
        owner=owner,
        swaps=swaps,
        config=VLLMConfig(servers=[url], check_weights_interval=interval, timeout_minutes=5),
    )


@pytest.fixture
def engine(url: str, folder: Path, weights: Weights) -> VLLMServersEngine:
    engine = start(url, folder)
    engine.load_weights(weights.items(), version=1)
    return engine


def test_what_does_not_fit(url: str, folder: Path, tmp_path: Path) -> None:
    """The first test of this file: the server has nobody's weights yet."""

    def check(folder: Path, max_model_len: int = 256, dtype: torch.dtype = torch.float32) -> None:
        check_server(url, folder, dtype=dtype, max_model_len=max_model_len)

    check(folder)
    with pytest.raises(UserError, match=r"max_model_len is 256, the longest .* has 257 tokens"):
        check(folder, max_model_len=257)
    with pytest.raises(UserError, match=r"dtype is float32, model\.params_dtype means bfloat16"):
        check(folder, dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"vocab_size": 98}, "a vocabulary of 97, model.student .* of 98"),
        ({"num_hidden_layers": 7}, "num_hidden_layers = .*, model.student .* has 7"),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, "rope_theta = 10000"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            check(tmp_path)
    with pytest.raises(RolloutEngineError, match="no weights of this run"):
        start(url, folder).generate(PROMPTS, sampling())


def test_the_cache_has_the_blocks_that_a_plan_counts(url: str, folder: Path) -> None:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        metrics = answer.read().decode()
    (info,) = re.findall(r"^vllm:cache_config_info\{(.*)\}", metrics, re.MULTILINE)
    fields = dict(re.findall(r'(\w+)="([^"]*)"', info))
    a = read_architecture(HFFolder(folder))
    found = num_blocks(
        KV_CACHE_BYTES,
        bytes_per_token=2 * a.num_layers * a.num_query_groups * a.head_dim * 4,
        block_tokens=int(fields["block_size"]),
    )
    assert int(fields["num_gpu_blocks"]) == found


def test_same_tokens_as_hf(engine: VLLMServersEngine, folder: Path, weights: Weights) -> None:
    check_same_as_hf(engine, folder, weights, PROMPTS, known_ids=KNOWN)


def test_new_weights(engine: VLLMServersEngine, folder: Path, weights: Weights) -> None:
    """Also behind a prefix that is in the cache with the old weights."""
    old = engine.generate(PROMPTS, sampling())
    for version, seed in ((2, 1), (3, 2)):
        changed = others(weights, seed)
        changed["model.embed_tokens.weight"][list(MEANINGLESS)] = 0.0
        engine.load_weights(changed.items(), version=version)
        new = engine.generate(PROMPTS, sampling())
        check_greedy(folder, changed, new, never=MEANINGLESS)
        assert {rollout.weights_version for rollout in new} == {version}
        assert [r.response_ids for r in new] != [r.response_ids for r in old]


def test_weights_that_stay(
    engine: VLLMServersEngine, url: str, folder: Path, weights: Weights
) -> None:
    """They are checked as the others, and no worker warns of them."""
    for version, sent in ((2, "model.layers.3."), (3, "model.")):
        new = others(weights, seed=version)
        new["model.embed_tokens.weight"][list(MEANINGLESS)] = 0.0
        weights = check_partial_sync(
            engine, folder, weights, new, sent, PROMPTS, version=version, never=MEANINGLESS
        )
    log = (folder / "log").read_text()
    assert "Linear: Failed to load weights" not in log
    assert "weights were not loaded" not in log
    ServerClient(url).call("/update_weight_version", {"new_version": "default"})
    assert engine.needs_all_weights()


def test_seeds(engine: VLLMServersEngine, url: str, folder: Path) -> None:
    """A response depends on prompt, sample and seed, whichever replica asks for it."""
    random = sampling(temperature=2.0, samples_per_prompt=2)
    rollouts = engine.generate(PROMPTS, random)
    assert len({r.response_ids for r in rollouts}) == len(rollouts)
    replica = start(url, folder)
    assert rollouts == [r for p in PROMPTS for r in replica.generate([p], random)]
    assert {r.finished for r in rollouts} <= {True, False}
    for rollout in rollouts:
        assert not set(rollout.response_ids) & set(MEANINGLESS)
        assert rollout.finished == (rollout.response_ids[-1] == EOS_ID)


def test_weights_of_others(engine: VLLMServersEngine, url: str, folder: Path) -> None:
    with pytest.raises(WrongWeightsError, match="has weights of 'runs/a', not of 'runs/b'"):
        start(url, folder, owner="runs/b").generate(PROMPTS, sampling())


def test_check_finds_what_was_changed_on_the_way(
    engine: VLLMServersEngine, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    passing = SyncCheck.passing
    changed = "model.layers.2.self_attn.k_proj.weight"

    def changing(
        check: SyncCheck, stream: Iterator[tuple[str, Tensor]], *, left_out: Collection[str]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in passing(check, stream, left_out=left_out):
            yield name, tensor + 0.5 if name == changed else tensor

    monkeypatch.setattr(SyncCheck, "passing", changing)
    with pytest.raises(WrongWeightsError, match=rf"in 1 of \d+ tensors, the first '{changed}'"):
        engine.load_weights(weights.items())


def test_weights_in_the_middle_of_responses(url: str, folder: Path, weights: Weights) -> None:
    """They are held, go on with the new weights, and carry the version of the old ones."""
    engine = start(url, folder, swaps=True)
    engine.load_weights(weights.items(), version=1)
    changed = others(weights, 7)
    changed["model.embed_tokens.weight"][list(MEANINGLESS)] = 0.0
    # Enough of them that they take seconds.
    long = sampling(max_new_tokens=230, logprobs=False, samples_per_prompt=24)
    engine.start(PROMPTS[:2], long)
    time.sleep(0.5)
    # A second call behind the first, as for the step after it.
    engine.start(PROMPTS[2:3], sampling(logprobs=False))
    engine.load_weights(changed.items(), version=2)
    rollouts, later = engine.finish(), engine.finish()
    assert {one.weights_version for one in rollouts} == {1}
    assert len(later) == 1
    in_the_middle = 0
    for rollout in {one.response_ids: one for one in rollouts}.values():
        chosen = torch.tensor(rollout.response_ids)
        first, second = (
            _most_likely(logits_of(folder, of, rollout)) == chosen for of in (weights, changed)
        )
        # Tokens of the old weights, then of the new ones, which see the old ones' tokens.
        old = int(first.int().cumprod(0).sum())
        assert any(bool(second[k:].all()) for k in range(1, old + 1))
        in_the_middle += old < len(chosen)
    assert in_the_middle
    assert {one.weights_version for one in engine.generate(PROMPTS, sampling())} == {2}


def _most_likely(logits: Tensor) -> Tensor:
    logits[:, list(MEANINGLESS)] = -torch.inf
    return logits.argmax(-1)


def test_weights_that_do_not_come(
    engine: VLLMServersEngine, folder: Path, weights: Weights
) -> None:
    """A server that got a part goes on, gives nothing out, and takes other weights."""
    with pytest.raises(ValueError, match="1 weights were not delivered"):
        engine.load_weights(list(weights.items())[:-1], version=4)
    with pytest.raises(RolloutEngineError, match="no weights of this run"):
        engine.generate(PROMPTS, sampling())
    weights = others(weights, 3)
    engine.load_weights(weights.items(), version=5)
    check_greedy(
        folder, weights, engine.generate(PROMPTS[:1], sampling(logprobs=False)), never=MEANINGLESS
    )


@pytest.mark.slow
def test_two_workers_of_a_server_of_our_own(
    folder: Path, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker takes its part of the weights; nothing is left of the server at its end."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv(VARIABLE, "s3cret")
    settings: dict[str, Any] = {**SETTINGS, "tensor_model_parallel_size": 2, "start_servers": 1}
    server = ServerProcess(
        folder,
        dtype=torch.float32,
        max_model_len=256,
        host="127.0.0.1",
        log=tmp_path / "log",
        config=VLLMConfig(**settings),
    )
    with closing(server):
        server.ensure()
        engine = start(server.url, folder, interval=1)
        engine.load_weights(weights.items(), version=1)
        check_same_as_hf(engine, folder, weights, PROMPTS, known_ids=KNOWN)
        changed = others(weights, 1)
        changed["model.embed_tokens.weight"][list(MEANINGLESS)] = 0.0
        engine.load_weights(changed.items(), version=2)
        new = engine.generate(PROMPTS, sampling())
        check_greedy(folder, changed, new, never=MEANINGLESS)
        assert {rollout.weights_version for rollout in new} == {2}
        workers = ServerClient(server.url).workers("oprd_describe")
        assert len(workers) == 2
        monkeypatch.delenv(VARIABLE)
        for path in ("/weight_info", "/collective_rpc"):
            with pytest.raises(RolloutEngineError, match="with 401"):
                ServerClient(server.url).call(path)
    with pytest.raises(RolloutEngineError, match="refused"):
        ServerClient(server.url).call("/health")
