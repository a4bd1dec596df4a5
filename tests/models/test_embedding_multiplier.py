"""The factor on embeddings, in the precision of the weights."""

import dataclasses

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from megatron_oprd.models.build import _embedding_multiplier
from megatron_oprd.models.families import FAMILIES
from tests.helpers.tiny import tiny_config

WIDTH = 5376  # of the 27B


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemma_rounds_it_as_transformers_does(dtype: torch.dtype) -> None:
    config = tiny_config("gemma3_text", hidden_size=WIDTH)
    architecture = FAMILIES["Gemma3ForCausalLM"].architecture(config, "config.json")
    embedding = Gemma3TextScaledWordEmbedding(97, WIDTH, 0, embed_scale=WIDTH**0.5).to(dtype)
    tokens = torch.arange(1, 97)
    multiplier = _embedding_multiplier(architecture, dtype)
    assert torch.equal(embedding.weight[tokens] * multiplier, embedding(tokens))


def test_other_families_do_not_round() -> None:
    config = tiny_config("granite", embedding_multiplier=1.001)
    architecture = FAMILIES["GraniteForCausalLM"].architecture(config, "config.json")
    assert _embedding_multiplier(architecture, torch.bfloat16) == 1.001
    changed = dataclasses.replace(architecture, rounds_embedding_multiplier=True)
    assert _embedding_multiplier(changed, torch.bfloat16) == 1.0
