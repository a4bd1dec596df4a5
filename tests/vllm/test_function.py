"""Responses that a function of the user's makes with vLLM, against the same with transformers."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_oprd.rollout.function import UserFunction
from megatron_oprd.rollout.hf import HFEngine
from tests.helpers.closeness import assert_close_relative
from tests.helpers.rollout_functions import INSERTED, plain, two_turns
from tests.helpers.tiny import EOS_ID, PAD_ID, save_tiny_model, tiny_tokenizer
from tests.vllm.engines import CPU, prompt, sampling, start, tiny_llama

pytestmark = pytest.mark.slow

PROMPTS = [prompt(3, 7, 8, 9, 10), prompt(0, 20), prompt(8, 5, 30, 31, 32, 33, 34)]


def test_several_turns(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tiny_llama(), seed=0)
    weights = load_file(tmp_path / "model.safetensors")
    hf = HFEngine(
        tmp_path,
        dtype=next(iter(weights.values())).dtype,
        device=CPU,
        eos_token_ids=[EOS_ID],
        pad_token_id=PAD_ID,
        known_ids=range(97),
    )
    hf.load_weights(weights.items())
    function, once = (
        UserFunction(name="mine", function=one, tokenizer=tiny_tokenizer())
        for one in (two_turns, plain)
    )
    engine = start(tmp_path, known_ids=range(97))
    try:
        engine.load_weights(weights.items(), version=4)
        ours = function.generate(engine, PROMPTS, sampling())
        theirs = function.generate(hf, PROMPTS, sampling())
        # Sampled, with seeds: by itself, all together, and as the engine alone.
        step = sampling(temperature=2.0, samples_per_prompt=2)
        together = function.generate(engine, PROMPTS, step)
        apart = [
            rollout
            for one in PROMPTS
            for sample in (0, 1)
            for rollout in function.generate(engine, [replace(one, samples=(sample,))], step)
        ]
        alone = engine.generate(PROMPTS, step)
        of_one_turn = once.generate(engine, PROMPTS, step)
    finally:
        engine.close()
    assert [one.weights_version for one in ours] == [4, 4, 4]
    for one, other in zip(ours, theirs, strict=True):
        assert replace(one, weights_version=0) == other
        assert one.response_ids[3:6] == INSERTED
        assert one.finished or len(one.response_ids) == 12
        assert one.logprobs is not None
        assert len(one.logprobs) == one.num_written
        assert_close_relative(one.logprobs, other.logprobs, 1e-4)
    assert together == apart
    assert len({one.response_ids for one in together}) == 6
    assert of_one_turn == alone
