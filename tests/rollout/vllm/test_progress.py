"""How far an engine's process is, told while it generates; vLLM is the stand-in."""

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.engine import Progress, SamplingParams
from megatron_oprd.rollout.vllm.engine import VLLMEngine
from megatron_oprd.rollout.vllm.progress import SharedProgress
from tests.helpers.ranks import ROOT
from tests.helpers.tiny import EOS_ID, save_tiny_model, tiny_config


def test_both_sides_see_the_same() -> None:
    ours, descriptor = SharedProgress.create()
    theirs = SharedProgress(descriptor)
    assert ours.get() == Progress(responses=0, tokens=0)
    theirs.set(Progress(responses=3, tokens=2**40))
    assert ours.get() == Progress(responses=3, tokens=2**40)


def test_responses_are_counted_while_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in stops after the second of three responses until it is told to go on."""
    folder, faults = tmp_path / "model", tmp_path / "faults"
    save_tiny_model(folder, tiny_config("llama"), seed=0)
    faults.mkdir()
    (faults / "1.response.2.wait").touch()
    monkeypatch.setenv("FAKE_VLLM_FAULTS", str(faults))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT / "tests/fakes/vllm_stand_in"), str(ROOT)])
    )
    engine = VLLMEngine(
        folder,
        dtype=torch.float32,
        device=torch.device("cpu"),
        eos_token_ids=[EOS_ID],
        known_ids=range(97),
        max_model_len=64,
        config=VLLMConfig(timeout_minutes=2),
    )
    try:
        engine.load_weights(load_file(folder / "model.safetensors").items())
        sampling = SamplingParams(max_new_tokens=7, seed=0)
        prompts = [Prompt(index=index, token_ids=(5, 6)) for index in range(3)]
        engine.start(prompts, sampling)
        until = time.monotonic() + 60
        while engine.progress().responses < 2 and time.monotonic() < until:
            time.sleep(0.02)
        assert engine.progress() == Progress(responses=2, tokens=14)
        (faults / "updating").touch()
        assert len(engine.finish()) == 3
        assert engine.progress() == Progress(responses=3, tokens=21)
        # The next ones are counted from 0.
        engine.generate(prompts[:1], sampling)
        assert engine.progress() == Progress(responses=1, tokens=7)
    finally:
        engine.close()
