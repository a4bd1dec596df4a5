"""An engine that has the weights in FP8."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_oprd.rollout.engine import Rollout
from tests.helpers.tiny import save_tiny_model
from tests.vllm.engines import Weights, logits_of, prompt, sampling, start, tiny_llama

pytestmark = pytest.mark.slow

PROMPTS = [prompt(index, 7 + index, 8, 9) for index in range(6)]


def distance(folder: Path, weights: Weights, rollouts: list[Rollout]) -> float:
    """Mean |difference| of log-probabilities from those of transformers' model in fp32."""
    differences = []
    for rollout in rollouts:
        logits = logits_of(folder, weights, rollout).log_softmax(-1)
        expected = logits.gather(1, torch.tensor(rollout.response_ids)[:, None]).squeeze(1)
        differences.append((expected - torch.tensor(rollout.logprobs)).abs())
    return float(torch.cat(differences).mean())


def tokens(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.response_ids for rollout in rollouts]


def assert_alike(found: list[Rollout], expected: list[Rollout], rounding: float) -> None:
    """The same weights: the same first tokens, and log-probabilities of these up to rounding."""
    for one, other in zip(found, expected, strict=True):
        assert one.response_ids[0] == other.response_ids[0]
        first, second = (rollout.logprobs or () for rollout in (one, other))
        assert abs(first[0] - second[0]) <= 5 * rounding


def test_weights_are_quantised_at_each_sync(tmp_path: Path) -> None:
    """As far from the weights as FP8 is, at every sync, and from those of that sync."""
    save_tiny_model(tmp_path, tiny_llama(), seed=0)
    weights = {
        n: t.bfloat16().float() for n, t in load_file(tmp_path / "model.safetensors").items()
    }
    name = "model.layers.1.mlp.down_proj.weight"
    others = {**weights, name: weights[name] * -3}
    plain = start(tmp_path, dtype=torch.bfloat16)
    try:
        plain.load_weights(weights.items(), version=0)
        rounding = distance(tmp_path, weights, plain.generate(PROMPTS, sampling()))
    finally:
        plain.close()
    engine = start(tmp_path, dtype=torch.bfloat16, quantization="fp8_per_channel")
    try:
        answers = []
        for version, sent in enumerate((weights, others, weights)):
            engine.load_weights(sent.items(), version=version)
            rollouts = engine.generate(PROMPTS, sampling())
            # FP8 is 8 times as coarse as bf16.
            assert 2 * rounding < distance(tmp_path, sent, rollouts) < 50 * rounding
            answers.append(rollouts)
        assert distance(tmp_path, others, rollouts) > 100 * rounding
        assert_alike(answers[0], answers[2], rounding)
        assert tokens(answers[0]) != tokens(answers[1])
        # What stays has the values that it was quantised to.
        stays = {one for one in weights if not one.startswith("model.layers.1.")}
        changed = {one: others[one] for one in weights.keys() - stays}
        engine.load_weights(changed.items(), version=3, left_out=stays)
        rollouts = engine.generate(PROMPTS, sampling())
        assert_alike(rollouts, answers[1], rounding)
    finally:
        engine.close()
