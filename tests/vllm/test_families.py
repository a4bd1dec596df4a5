"""Tiny models of other families in vLLM: two syncs of weights, each with transformers' tokens.

One engine start for each family. docs/models.md says which families vLLM's CPU build cannot run.
"""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.helpers.tiny import save_tiny_model, tiny_config
from tests.vllm.engines import check_greedy, prompt, sampling, start

pytestmark = pytest.mark.slow

# Heads of 32, the smallest that vLLM has kernels for on a CPU.
HEADS = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
# name: (model_type, fields). Windows are shorter than the sequences, of up to 19 tokens.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic_rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "exaone4": ("exaone4", {}),
    # vLLM has no other head than the embedding.
    "gemma2": ("gemma2", {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {}),
    "glm4": ("glm4", {}),
    "granite": ("granite", {}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "phi3": ("phi3", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "seed_oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {}),
    "yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
}
PROMPTS = [prompt(3, 7, 8, 9, 10, 11, 12), prompt(0, 20), prompt(8, 5, 30, 31, 32, 33, 34)]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_and_logprobs_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """The second sync's weights are other ones than those of the folder that the engine has."""
    family, fields = FAMILIES[name]
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        save_tiny_model(folder, tiny_config(family, **HEADS | fields), seed=seed)
    engine = start(folders[0], known_ids=range(97))
    try:
        responses = set()
        for version, folder in enumerate(folders, start=1):
            weights = load_file(folder / "model.safetensors")
            engine.load_weights(weights.items(), version=version)
            rollouts = engine.generate(PROMPTS, sampling())
            check_greedy(folder, {}, rollouts)
            responses |= {rollout.response_ids for rollout in rollouts}
        # Other weights, and other prompts, have other responses.
        assert len(responses) > len(PROMPTS)
    finally:
        engine.close()
