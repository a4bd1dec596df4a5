"""A vLLM server's client against a stand-in: what is refused, and what is told apart."""

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.errors import UserError
from megatron_oprd.rollout.engine import (
    Progress,
    RolloutEngineError,
    SamplingParams,
    WrongWeightsError,
)
from megatron_oprd.rollout.vllm.client import GENERATE, check_server
from megatron_oprd.rollout.vllm.servers import VLLMServersEngine
from tests.fakes.vllm_server import FakeServer
from tests.helpers.tiny import EOS_ID, save_tiny_model, tiny_config

PROMPTS = [Prompt(index=index, token_ids=(7, index)) for index in (4, 2)]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.4, 1.5, 1.6],
    "original_max_position_embeddings": 64,
}
SAMPLING = SamplingParams(max_new_tokens=3, seed=0, samples_per_prompt=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_tiny_model(folder, tiny_config("qwen3", tie_word_embeddings=True), seed=0)
    return folder


@pytest.fixture
def server() -> Iterator[FakeServer]:
    config = tiny_config("qwen3", tie_word_embeddings=True)
    server = FakeServer(json.loads(config.to_json_string(use_diff=False)))
    yield server
    server.close()


@pytest.fixture
def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def check(url: str, folder: Path, **options: Any) -> None:
    arguments: dict[str, Any] = {"dtype": torch.float32, "max_model_len": 256}
    check_server(url, folder, **(arguments | options))


def engine(
    server: FakeServer | list[FakeServer],
    folder: Path,
    owner: str = "runs/a",
    seconds: float = 20,
    **options: Any,
) -> VLLMServersEngine:
    return VLLMServersEngine(
        folder,
        dtype=torch.float32,
        eos_token_ids=[EOS_ID],
        known_ids=range(95),
        owner=owner,
        config=VLLMConfig(
            servers=[one.url for one in (server if isinstance(server, list) else [server])],
            check_weights_interval=1,
            sync_timeout_minutes=seconds / 60,
        ),
        **options,
    )


def test_a_server_that_fits(server: FakeServer, folder: Path) -> None:
    check(server.url, folder)


def test_unreachable(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(
        UserError, match=rf"servers: {url}: .*does not answer /health: .* vllm serve"
    ):
        check(url, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 151}, r"model has a vocabulary of 151, model.student \(.*\) of 97"),
        ({"hidden_size": 64}, r"model has hidden_size = 64, model.student \(.*\) has 32"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "model has rope_theta = 7.0, .* has 10000"),
        ({"model_type": "llama"}, "model has model_type = llama, .* has qwen3"),
        ({"tie_word_embeddings": False}, "has tie_word_embeddings = False, .* has True"),
        ({"sliding_window": 64}, "has sliding_window = 64, .* has None"),
        (
            {"layer_types": ["full_attention", *["sliding_attention"] * 3]},
            r"has layer_types\[1\] = sliding_attention, .* has full_attention",
        ),
    ],
)
def test_another_model(
    server: FakeServer, folder: Path, changes: dict[str, Any], message: str
) -> None:
    server.config |= changes
    with pytest.raises(UserError, match=message + ".*; start it as VLLM_SERVER_DEV_MODE=1 vllm"):
        check(server.url, folder)


def test_other_yarn(server: FakeServer, tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0}
    yarn["original_max_position_embeddings"] = 64
    config = tiny_config("qwen3", rope_parameters=yarn)
    config.save_pretrained(tmp_path)
    server.config = json.loads(config.to_json_string(use_diff=False))
    check(server.url, tmp_path)
    server.config["rope_parameters"]["beta_fast"] = 16.0
    with pytest.raises(UserError, match=r"has beta_fast = 16\.0, .* has 32\.0"):
        check(server.url, tmp_path)


@pytest.mark.parametrize("factors", ["short_factor", "long_factor"])
def test_other_rope_factors(server: FakeServer, tmp_path: Path, factors: str) -> None:
    config = tiny_config("phi3", rope_parameters=LONGROPE)
    config.save_pretrained(tmp_path)
    server.config = json.loads(config.to_json_string(use_diff=False))
    check(server.url, tmp_path)
    server.config["rope_parameters"][factors][2] = 7.0
    with pytest.raises(UserError, match=rf"has {factors}\[2\] = 7\.0, .* has 1\.\d"):
        check(server.url, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype is bfloat16, model.params_dtype means float32"),
        ({"max_model_len": 255}, "max_model_len is 255, the longest .* has 256 tokens; .* 256"),
        ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode is processed_logprobs"),
    ],
)
def test_another_start(
    server: FakeServer, folder: Path, changes: dict[str, Any], message: str
) -> None:
    server.described |= changes
    with pytest.raises(UserError, match=message):
        check(server.url, folder)


def test_ways_that_weights_cannot_go(server: FakeServer, folder: Path) -> None:
    """A server without one, with one of vLLM's others, and with GPUs that the trainer has not."""
    for backend in (None, "sparse_nccl"):
        server.described["weight_transfer"] = backend
        with pytest.raises(
            UserError,
            match=rf"backend {backend!r}; right are 'nccl' .* and 'megatron_oprd_tcp'.*vllm serve",
        ):
            check(server.url, folder)
    if not torch.cuda.is_available():
        server.described["weight_transfer"] = "nccl"
        with pytest.raises(UserError, match="is 'nccl', and this trainer has no GPU"):
            check(server.url, folder)


def test_what_the_server_lacks(server: FakeServer, folder: Path) -> None:
    server.instead[GENERATE] = lambda: (403, b"disabled")
    with pytest.raises(
        UserError, match=r"takes no token ids; .*--enable-scale-out.* 403: disabled"
    ):
        check(server.url, folder)
    server.extension = ""
    with pytest.raises(UserError, match="worker-extension-cls is ''; install this package beside"):
        check(server.url, folder)
    server.instead["/server_info"] = lambda: (404, b"Not Found")
    with pytest.raises(UserError, match="takes no weights; start it with VLLM_SERVER_DEV_MODE=1"):
        check(server.url, folder)


def test_sync_and_rollouts(server: FakeServer, folder: Path, weights: dict[str, Tensor]) -> None:
    one = engine(server, folder)
    assert server.masked == [95, 96]
    with pytest.raises(RolloutEngineError, match="no weights of this run"):
        one.generate(PROMPTS, SAMPLING)
    head = ("lm_head.weight", weights["model.embed_tokens.weight"])
    one.load_weights([*weights.items(), head], version=5)
    assert server.weights.keys() == weights.keys()
    assert all(torch.equal(server.weights[name], weights[name]) for name in weights)
    rollouts = one.generate(PROMPTS, SAMPLING)
    assert [(r.prompt_index, r.sample_index) for r in rollouts] == [(4, 0), (4, 1), (2, 0), (2, 1)]
    assert {r.weights_version for r in rollouts} == {5}
    assert len({r.response_ids for r in rollouts}) == 4
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    assert one.progress() == Progress(responses=len(rollouts), tokens=tokens)
    assert rollouts == [r for p in PROMPTS for r in one.generate([p], SAMPLING)]
    assert rollouts[0].logprobs is None
    asked = one.generate(PROMPTS, dataclasses.replace(SAMPLING, logprobs=True))
    assert asked == rollouts
    assert asked[0].logprobs == (-0.5, -0.5, -0.5)
    with pytest.raises(WrongWeightsError, match="has weights of 'runs/a', not of 'runs/b'"):
        engine(server, folder, owner="runs/b").generate(PROMPTS, SAMPLING)
    server.finish_reason = "abort"
    with pytest.raises(RolloutEngineError, match="ended a response: abort"):
        one.generate(PROMPTS, SAMPLING)


def test_no_more_requests_at_once_than_the_batch_size(
    server: FakeServer, folder: Path, weights: dict[str, Tensor]
) -> None:
    lock, counts, under_way = threading.Lock(), [], 0

    def slowly() -> None:
        nonlocal under_way
        with lock:
            under_way += 1
            counts.append(under_way)
        time.sleep(0.05)
        with lock:
            under_way -= 1

    server.instead[GENERATE] = slowly
    for size, expected in ((1, 1), (2, 2), (None, 4)):
        one = engine(server, folder, max_batch_size=size)
        one.load_weights(weights.items(), version=1)
        counts.clear()
        assert len(one.generate(PROMPTS, SAMPLING)) == 4
        assert max(counts) == expected, size


def test_a_server_that_was_started_anew_between_two_steps(
    server: FakeServer, folder: Path, weights: dict[str, Tensor]
) -> None:
    one = engine(server, folder)
    one.load_weights(weights.items(), version=1)
    assert not one.needs_all_weights()
    server.start_again()
    assert one.needs_all_weights()
    one.load_weights(weights.items(), version=2)
    assert server.masked == [95, 96]
    assert {rollout.weights_version for rollout in one.generate(PROMPTS, SAMPLING)} == {2}


def test_weights_that_stay(server: FakeServer, folder: Path, weights: dict[str, Tensor]) -> None:
    """They count as there until somebody else sends weights."""
    one = engine(server, folder)
    assert one.needs_all_weights()
    one.load_weights(weights.items(), version=1)
    stay = [name for name in weights if ".layers.3." in name]
    changed = {name: 2 * tensor for name, tensor in weights.items() if name not in stay}
    one.load_weights(changed.items(), version=2, left_out=stay)
    assert all(torch.equal(server.weights[n], (weights | changed)[n]) for n in weights)
    assert {r.weights_version for r in one.generate(PROMPTS, SAMPLING)} == {2}
    # As another replica's leader, who has sent nothing.
    assert engine(server, folder).needs_all_weights()
    assert not one.needs_all_weights()
    with pytest.raises(ValueError, match=f"1 weights were not delivered, the first '{stay[-1]}'"):
        one.load_weights(changed.items(), version=3, left_out=stay[:-1])
    assert one.needs_all_weights()
    one.load_weights(weights.items(), version=6)
    server.label = "runs/b#6"
    assert one.needs_all_weights()
    with pytest.raises(RolloutEngineError, match="has lost the last sync's weights"):
        one.load_weights(changed.items(), version=7, left_out=stay)
    assert server.label == "runs/b#6"


def test_answers_that_are_none(
    server: FakeServer, folder: Path, weights: dict[str, Tensor]
) -> None:
    one = engine(server, folder)
    one.load_weights(weights.items())
    for status, body, message in (
        (500, b"out of memory", "answers /inference/v1/generate with 500: out of memory"),
        (200, b"<html>", "with what is no JSON"),
    ):
        server.instead[GENERATE] = lambda: (status, body)  # noqa: B023
        with pytest.raises(RolloutEngineError, match=message):
            one.generate(PROMPTS, SAMPLING)


def test_a_sync_that_fails(server: FakeServer, folder: Path, weights: dict[str, Tensor]) -> None:
    """In every case what is half loaded does not pass for weights."""
    one = engine(server, folder, seconds=1)
    one.load_weights(weights.items(), version=1)

    def fails(message: str) -> None:
        with pytest.raises(RolloutEngineError, match=message):
            one.load_weights(weights.items(), version=2)
        with pytest.raises(RolloutEngineError, match="no weights of this run"):
            one.generate(PROMPTS, SAMPLING)

    for path in (
        "/collective_rpc",
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
    ):
        server.instead[path] = lambda: (500, b"out of memory")
        fails("did not take weight sync 2: .*500: out of memory")
        server.instead.clear()
        assert server.label == "runs/a#unfinished"
    # No worker calls back.
    server.instead["/init_weight_transfer_engine"] = lambda: (200, b"{}")
    fails("did not take weight sync 2: timed out")
    server.instead.clear()
    with pytest.raises(ValueError, match="1 weights were not delivered"):
        one.load_weights(list(weights.items())[:-1], version=2)
    with pytest.raises(RolloutEngineError, match="no weights of this run"):
        one.generate(PROMPTS, SAMPLING)
    assert not server.is_updating
    one.load_weights(weights.items(), version=3)
    assert {r.weights_version for r in one.generate(PROMPTS, SAMPLING)} == {3}


def test_a_connection_stays_until_it_is_lost(
    server: FakeServer, folder: Path, weights: dict[str, Tensor]
) -> None:
    one = engine(server, folder)
    for version in (1, 2):
        one.load_weights(weights.items(), version=version)
    assert server.num_connections == 1
    server.start_again()
    one.load_weights(weights.items(), version=3)
    assert server.num_connections == 2
    assert all(torch.equal(server.weights[name], weights[name]) for name in weights)


def test_an_update_that_another_run_left(
    server: FakeServer, folder: Path, weights: dict[str, Tensor]
) -> None:
    """Its trainer was killed in the middle; the server still waits for weights."""
    server.label, server.is_updating = "runs/b#unfinished", True
    one = engine(server, folder)
    one.load_weights(weights.items(), version=1)
    assert {r.weights_version for r in one.generate(PROMPTS, SAMPLING)} == {1}


def test_wrong_weights(server: FakeServer, folder: Path, weights: dict[str, Tensor]) -> None:
    """A checksum of each tensor, by which a changed one is named."""
    found = server.oprd_digests
    changed = {"model.norm.weight": "0"}
    server.oprd_digests = lambda: found() | changed  # type: ignore[method-assign]
    with pytest.raises(
        WrongWeightsError, match=r"in 1 of .* tensors, the first 'model.norm.weight'"
    ):
        engine(server, folder).load_weights(weights.items())


@pytest.fixture
def other() -> Iterator[FakeServer]:
    server = FakeServer({})
    yield server
    server.close()


def count_requests(server: FakeServer, counts: list[int], seconds: float = 0.02) -> None:
    number = len(counts)
    counts.append(0)

    def generate() -> None:
        counts[number] += 1
        time.sleep(seconds)

    server.instead[GENERATE] = generate


def test_several_servers_share_the_requests(
    server: FakeServer, other: FakeServer, folder: Path, weights: dict[str, Tensor]
) -> None:
    """The slower one gets fewer, and the number of servers changes no response."""
    alone = engine(server, folder)
    alone.load_weights(weights.items(), version=3)
    many = dataclasses.replace(SAMPLING, samples_per_prompt=20)
    expected = alone.generate(PROMPTS, many)
    both = engine([server, other], folder, max_batch_size=4)
    assert both.needs_all_weights()
    both.load_weights(weights.items(), version=3)
    assert not both.needs_all_weights()
    for one in (server, other):
        assert one.masked == [95, 96]
        assert all(torch.equal(one.weights[name], weights[name]) for name in weights)
    counts: list[int] = []
    count_requests(server, counts)
    count_requests(other, counts, seconds=0.2)
    assert both.generate(PROMPTS, many) == expected
    assert sum(counts) == 40
    assert 0 < counts[1] < counts[0]


def test_a_server_that_fails_is_left_out_until_it_is_back(
    server: FakeServer,
    other: FakeServer,
    folder: Path,
    weights: dict[str, Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    both = engine([server, other], folder)
    both.load_weights(weights.items(), version=1)
    expected = both.generate(PROMPTS, SAMPLING)
    # In a rollout: it restarts, and has no weights.
    other.instead[GENERATE] = lambda: (500, b"out of memory")
    assert both.generate(PROMPTS, SAMPLING) == expected
    assert "left out until the next sync" in caplog.text
    assert "500: out of memory" in caplog.text
    other.instead.clear()
    other.start_again()
    assert both.generate(PROMPTS, SAMPLING) == expected
    assert both.needs_all_weights()
    # In a sync.
    other.instead["/collective_rpc"] = lambda: (500, b"lost")
    both.load_weights(weights.items(), version=2)
    assert other.label == "runs/a#unfinished"
    assert {r.weights_version for r in both.generate(PROMPTS, SAMPLING)} == {2}
    other.instead.clear()
    # Down between two syncs, so that it has the weights of the one before.
    other.label = "runs/a#1"
    assert {r.weights_version for r in both.generate(PROMPTS, SAMPLING)} == {2}
    # Back again.
    both.load_weights(weights.items(), version=3)
    counts: list[int] = []
    count_requests(other, counts)
    assert {r.weights_version for r in both.generate(PROMPTS, SAMPLING)} == {3}
    assert counts[0] > 0
    # Nobody is left.
    for one in (server, other):
        one.instead[GENERATE] = lambda: (500, b"out of memory")
    with pytest.raises(RolloutEngineError, match="500: out of memory"):
        both.generate(PROMPTS, SAMPLING)
    for one in (server, other):
        one.instead["/health"] = lambda: (503, b"ending")
    with pytest.raises(RolloutEngineError, match="did not take weight sync 4: no server is up"):
        both.load_weights(weights.items(), version=4)


def test_another_runs_weights_on_one_of_two(
    server: FakeServer, other: FakeServer, folder: Path, weights: dict[str, Tensor]
) -> None:
    both = engine([server, other], folder)
    both.load_weights(weights.items(), version=1)
    other.label = "runs/b#1"
    with pytest.raises(WrongWeightsError, match="weights of 'runs/b', not of 'runs/a'"):
        both.generate(PROMPTS, SAMPLING)


def test_weights_in_the_middle_of_a_response(
    server: FakeServer, folder: Path, weights: dict[str, Tensor]
) -> None:
    """Where it is allowed, a response has the version of its oldest token."""
    swapping = engine(server, folder, swaps=True)
    swapping.load_weights(weights.items(), version=1)
    swapping.start(PROMPTS, SAMPLING)
    swapping.load_weights(weights.items(), version=2)
    assert server.pauses == server.resumes == 1
    assert {rollout.weights_version for rollout in swapping.finish()} <= {1, 2}
    server.label, server.spans = "runs/a#1", ["runs/a#1", "runs/a#2"]
    assert {rollout.weights_version for rollout in swapping.generate(PROMPTS, SAMPLING)} == {1}
    with pytest.raises(WrongWeightsError, match=r"versions \[1, 2\], asked for were .* version 1"):
        engine(server, folder).generate(PROMPTS, SAMPLING)
