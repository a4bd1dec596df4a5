from dataclasses import replace
from pathlib import Path

import pytest

from megatron_oprd.models.families import read_architecture
from megatron_oprd.models.flops import attention_flops, linear_flops
from megatron_oprd.weights.hf_files import HFFolder
from tests.planning.models import model_folder


def test_causal_attention(tmp_path: Path) -> None:
    """Each token's query meets its own key and those before; then as many values are summed up."""
    a = replace(
        read_architecture(HFFolder(model_folder(tmp_path, "Qwen3-4B"))),
        num_attention_heads=3, head_dim=5,
    )  # fmt: skip
    by_token = [2 * (2 * 3 * 5 * (position + 1)) for position in range(9)]
    assert attention_flops(a, first=0, last=9) == sum(by_token)
    assert attention_flops(a, first=4, last=9) == sum(by_token[4:])


def test_attention_in_a_window(tmp_path: Path) -> None:
    """A token meets at most as many keys as the window has, in every fourth layer here."""
    a = replace(
        read_architecture(HFFolder(model_folder(tmp_path, "Qwen3-4B"))),
        num_attention_heads=3, head_dim=5, num_layers=8, sliding_window=4,
        sliding_layers=(False, False, False, True) * 2,
    )  # fmt: skip
    for first in (0, 2, 6):
        keys = sum(0.25 * min(t + 1, 4) + 0.75 * (t + 1) for t in range(first, 9))
        of_key = 4 * 3 * 5
        found = attention_flops(a, first=first, last=9)
        assert found == pytest.approx(keys * of_key, abs=of_key)  # it counts whole keys


def test_linear_layers(tmp_path: Path) -> None:
    """Two for each weight that a token meets: Qwen3-30B-A3B has 3.3B of these, 2.7B in its layers.

    3.3B is the published number, with an embedding that takes no FLOPs and the LM head.
    """
    a = read_architecture(HFFolder(model_folder(tmp_path, "Qwen3-30B-A3B")))
    active = linear_flops(a, range(a.num_layers)) / 2 + 2 * a.vocab_size * a.hidden_size
    assert 3.3e9 <= active < 3.4e9


def test_first_layers_without_experts(tmp_path: Path) -> None:
    """GLM-4.5-Air's first layer: the MLP of width 10944, not 8 experts of 1408 and a router."""
    a = read_architecture(HFFolder(model_folder(tmp_path, "GLM-4.5-Air")))
    first, second = (linear_flops(a, [layer]) for layer in (0, 1))
    mlp, expert = 3 * 4096 * 10944, 3 * 4096 * 1408
    assert second - first == 2 * ((8 + 1) * expert + 4096 * 128 - mlp)
    assert linear_flops(a, range(a.num_layers)) == first + 45 * second
