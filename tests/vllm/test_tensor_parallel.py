"""An engine that is split over two workers."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from megatron_oprd.rollout.engine import RolloutEngineError, WrongWeightsError
from megatron_oprd.rollout.vllm.engine import VLLMEngine
from tests.helpers.engine_processes import engine_processes
from tests.helpers.tiny import save_tiny_model
from tests.vllm.engines import (
    Weights,
    change_on_the_way,
    check_greedy,
    prompt,
    sampling,
    start,
    tiny_llama,
)

pytestmark = pytest.mark.slow

PROMPTS = [prompt(index, 7 + index, 8, 9) for index in range(4)]
MEANINGLESS = (11, 96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    # Both workers have the only key/value head.
    save_tiny_model(folder, tiny_llama(tie_word_embeddings=True, num_key_value_heads=1), seed=0)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VLLMEngine]:
    engine = start(
        folder,
        known_ids=set(range(97)) - set(MEANINGLESS),
        tensor_model_parallel_size=2,
        sync_bucket_mb=1,
        check_weights_interval=1,
    )
    yield engine
    engine.close()


@pytest.fixture
def weights(folder: Path) -> Weights:
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 0.25  # less sure that a token repeats
    return weights


def test_same_tokens_as_transformers(engine: VLLMEngine, folder: Path, weights: Weights) -> None:
    answers = []
    for version, sent in ((3, "model."), (4, "model.layers.1.")):
        changed = {name: tensor for name, tensor in weights.items() if name.startswith(sent)}
        stays = weights.keys() - changed.keys()
        engine.load_weights(changed.items(), version=version, left_out=stays)
        rollouts = engine.generate(PROMPTS, sampling())
        assert {rollout.weights_version for rollout in rollouts} == {version}
        check_greedy(folder, weights, rollouts, never=MEANINGLESS)
        answers.append([rollout.response_ids for rollout in rollouts])
        weights["model.layers.1.mlp.down_proj.weight"] *= -3
    assert answers[0] != answers[1]


def test_check_finds_what_was_changed_on_the_way(
    engine: VLLMEngine, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    change_on_the_way(name, monkeypatch)
    with pytest.raises(WrongWeightsError, match=rf"in 1 of \d+ tensors, the first '{name}'"):
        engine.load_weights(weights.items())


def test_a_worker_that_is_killed(engine: VLLMEngine) -> None:
    """The last test of this file. The other worker and their engine do not live on."""
    children = engine_processes()[0].children(recursive=True)
    workers = [child for child in children if "Worker" in child.name()]
    assert len(workers) == 2
    os.kill(workers[1].pid, signal.SIGKILL)
    with pytest.raises(RolloutEngineError, match="vLLM process"):
        engine.generate(PROMPTS, sampling())
    engine.close()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
