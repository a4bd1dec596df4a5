"""An engine that has the weights in FP8."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_oprd.rollout.engine import Rollout
from tests.helpers.tiny import save_tiny_model
from tests.vllm.engines import Weights, logits_of, prompt, sampling, start, tiny_llama

PROMPTS = [prompt(index, 7 + index, 8, 9) for index in range(6)]


def distance(folder: Path, weights: Weights, rollouts: list[Rollout]) -> float:
    """Mean |difference| of log-probabilities from those of transformers' model in fp32."""
    differences = []
    for rollout in rollouts:
        logits = logits_of(folder, weights, rollout).log_softmax(-1)
        expected = logits.gather(1, torch.tensor(rollout.response_ids)[:, None]).squeeze(1)
        differences.append((expected - torch.tensor(rollout.logprobs)).abs())
    return float(torch.cat(differences).mean())


def test_weights_are_quantised_at_each_sync(tmp_path: Path) -> None:
    """As far from the weights as FP8 is, at every sync, and from those of that sync."""
    save_tiny_model(tmp_path, tiny_llama(), seed=0)
    weights = {
        n: t.bfloat16().float() for n, t in load_file(tmp_path / "model.safetensors").items()
    }
    name = "model.layers.1.mlp.down_proj.weight"
    others = {**weights, name: weights[name] * -3}
    engine = start(tmp_path, dtype=torch.bfloat16, quantization="fp8_per_channel")
    try:
        answers = []
        for version, sent in enumerate((weights, others, weights)):
            engine.load_weights(sent.items(), version=version)
            rollouts = engine.generate(PROMPTS, sampling())
            # 0.01 in bf16
            assert 0.03 < distance(tmp_path, sent, rollouts) < 0.3
            answers.append([(rollout.response_ids, rollout.logprobs) for rollout in rollouts])
        assert distance(tmp_path, others, rollouts) > 1
        assert answers[0] == answers[2] != answers[1]
        # What stays has the values that it was quantised to.
        stays = {one for one in weights if not one.startswith("model.layers.1.")}
        changed = {one: others[one] for one in weights.keys() - stays}
        engine.load_weights(changed.items(), version=3, left_out=stays)
        rollouts = engine.generate(PROMPTS, sampling())
        assert [(one.response_ids, one.logprobs) for one in rollouts] == answers[1]
    finally:
        engine.close()
