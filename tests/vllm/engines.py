"""Engines for the tests, and what transformers says about the same weights."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.engine import Rollout, RolloutEngine, SamplingParams
from megatron_oprd.rollout.hf import HFEngine, attention_of
from megatron_oprd.rollout.vllm import transfers
from megatron_oprd.rollout.vllm.engine import VLLMEngine
from megatron_oprd.rollout.vllm.shared_memory import Chunk, write
from tests.helpers.closeness import assert_close_relative
from tests.helpers.tiny import EOS_ID, PAD_ID, random_weight, tiny_config

Weights = dict[str, Tensor]

CPU = torch.device("cpu")
# Nothing is compiled, which takes longer than all tests of a file, and memory is small.
SETTINGS: dict[str, Any] = {"enforce_eager": True, "kv_cache_gb": 0.25, "timeout_minutes": 5}


def tiny_llama(**fields: Any) -> PretrainedConfig:
    """A tiny Llama with heads of 32, the smallest that vLLM has kernels for on a CPU."""
    return tiny_config("llama", hidden_size=128, intermediate_size=192, **fields)


def start(folder: Path, **options: Any) -> VLLMEngine:
    """An engine of the folder's model, without weights.

    ``options`` are `VLLMEngine`'s, or settings of `VLLMConfig`.
    """
    arguments: dict[str, Any] = {
        "dtype": torch.float32,
        "device": CPU,
        "eos_token_ids": [EOS_ID],
        "known_ids": range(10**5),
        "max_model_len": 256,
    }
    settings = {k: v for k, v in options.items() if k in vars(VLLMConfig())}
    arguments |= {k: v for k, v in options.items() if k not in settings}
    return VLLMEngine(folder, config=VLLMConfig(**(SETTINGS | settings)), **arguments)


def sampling(**fields: Any) -> SamplingParams:
    ours = {"max_new_tokens": 12, "seed": 5, "temperature": 0.0, "logprobs": True}
    return SamplingParams(**(ours | fields))


def prompt(index: int, *token_ids: int) -> Prompt:
    return Prompt(index=index, token_ids=token_ids)


def logits_of(folder: Path, weights: Weights, rollout: Rollout) -> Tensor:
    """Logits [t, vocabulary] that transformers' model predicts the rollout's t tokens with."""
    attention = attention_of(AutoConfig.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    tokens = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
    with torch.no_grad():
        logits = model(tokens).logits[0]
    return logits[len(rollout.prompt_ids) - 1 : -1]


def check_greedy(
    folder: Path, weights: Weights, rollouts: Sequence[Rollout], *, never: Sequence[int] = ()
) -> None:
    """Checks tokens and log-probabilities, if any, of greedy rollouts against transformers' model.

    A token may be another than the most likely one where the two are as good as tied.
    """
    for rollout in rollouts:
        logits = logits_of(folder, weights, rollout)
        logits[:, list(never)] = -torch.inf
        chosen = logits.gather(1, torch.tensor(rollout.response_ids)[:, None]).squeeze(1)
        size = float(logits[logits.isfinite()].abs().max())
        assert float((logits.max(-1).values - chosen).max()) <= 1e-5 * size
        if rollout.logprobs is None:
            continue
        expected = chosen - logits.logsumexp(-1)
        assert_close_relative(torch.tensor(rollout.logprobs), expected, 1e-5, size=size)


def check_same_as_hf(
    engine: RolloutEngine,
    folder: Path,
    weights: Weights,
    prompts: Sequence[Prompt],
    *,
    known_ids: Collection[int],
) -> None:
    """Greedy responses of an engine that has these weights are those of `HFEngine`."""
    hf = HFEngine(
        folder,
        dtype=torch.float32,
        device=CPU,
        eos_token_ids=[EOS_ID],
        pad_token_id=PAD_ID,
        known_ids=known_ids,
    )
    hf.load_weights(weights.items())
    ours, theirs = (one.generate(prompts, sampling()) for one in (engine, hf))
    assert len({rollout.response_ids for rollout in ours}) > 1
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.response_ids == other.response_ids
        assert (mine.prompt_index, mine.prompt_ids) == (other.prompt_index, other.prompt_ids)
        assert mine.finished == other.finished


def change_on_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the values of a tensor change between the trainer and an engine on its machine."""

    def changing(chunk: Chunk, values: Tensor) -> None:
        write([(one, t + 0.5 if one == name else t) for one, t in chunk], values)

    monkeypatch.setattr(transfers, "write", changing)


def others(weights: Weights, seed: int) -> Weights:
    """Random weights in place of these."""
    generator = torch.Generator().manual_seed(seed)
    return {name: random_weight(name, t.shape, generator) for name, t in weights.items()}


def check_partial_sync(
    engine: RolloutEngine,
    folder: Path,
    weights: Weights,
    new: Weights,
    sent: str | tuple[str, ...],
    prompts: Sequence[Prompt],
    *,
    version: int,
    never: Sequence[int],
) -> Weights:
    """Sends the new weights whose names begin so, and leaves out the others, which stay.

    Returns:
        What the engine then has.
    """
    assert not engine.needs_all_weights()
    changed = {name: new[name] for name in weights if name.startswith(sent)}
    weights = weights | changed
    left_out = weights.keys() - changed.keys()
    engine.load_weights(changed.items(), version=version, left_out=left_out)
    rollouts = engine.generate(prompts, sampling())
    check_greedy(folder, weights, rollouts, never=never)
    assert {rollout.weights_version for rollout in rollouts} == {version}
    return weights
