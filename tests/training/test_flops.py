"""The FLOPs that a step reports, against those that torch counts in plain PyTorch models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megatron_oprd.training.flops import step_flops
from megatron_oprd.training.plan import RunPlan, make_plan
from tests.helpers.pairs import as_rollouts, config_of, save_pair

PROMPTS = [[5, 6], [5, 6, 7]]
RESPONSES = [[7] * 40, [7] * 9]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flops")
    save_pair(root / "llama", "llama")
    return root / "llama"


def plan_of(pair: Path, *overrides: str) -> RunPlan:
    return make_plan(config_of(pair, list(overrides)), world_size=1)


def counted(folder: Path, *, backward: bool) -> tuple[int, int]:
    """FLOPs that torch counts in the layers, and in the LM head, for the sequences above."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            logits = model(torch.tensor([prompt + response])).logits
            if backward:
                logits.sum().backward()
    of_modules = counter.get_flop_counts()
    name = type(model).__name__
    head = sum(of_modules[f"{name}.lm_head"].values())
    return sum(of_modules["Global"].values()) - head, head


def attention_of_halves(plan: RunPlan, *, of_one: float) -> float:
    """What torch counts beyond the causal half of attention's products, in one layer."""
    a = plan.layout.student.architecture
    lengths = [len(p) + len(r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    pairs = sum(n * n - n * (n + 1) // 2 for n in lengths)
    return of_one * 4 * a.num_attention_heads * a.head_dim * pairs


def test_passes_are_those_of_plain_pytorch(pair: Path) -> None:
    plan = plan_of(pair)
    teacher, _ = counted(pair / "teacher", backward=False)
    student, _ = counted(pair / "student", backward=True)
    layers = plan.layout.student.architecture.num_layers
    assert plan.layout.num_running_layers == layers
    assert sum(plan.layout.teacher.extent.layers_per_stage) == layers
    # Eager attention computes all pairs, and keeps the scores: twice the forward pass backwards,
    # where a kernel that recomputes them takes 2.5 times.
    lengths = [len(p) + len(r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    a = plan.layout.student.architecture
    causal = sum(4 * a.num_attention_heads * a.head_dim * n * (n + 1) // 2 for n in lengths)
    expected = (
        teacher + student - layers * attention_of_halves(plan, of_one=1 + 3) + layers * causal / 2
    )
    found = step_flops(plan, as_rollouts(PROMPTS, RESPONSES), num_output_rows=0)
    assert found == pytest.approx(expected, rel=1e-3)


def test_layers_past_the_deepest_tap_do_not_count(pair: Path) -> None:
    rollouts = as_rollouts(PROMPTS, RESPONSES)
    whole = step_flops(plan_of(pair), rollouts, num_output_rows=0)
    half = step_flops(plan_of(pair, "taps.layers=[0,1]"), rollouts, num_output_rows=0)
    assert half == pytest.approx(whole / 2)


def test_a_loss_on_distributions_adds_both_heads(pair: Path) -> None:
    plan = plan_of(pair, "output_loss.kind=reverse_kl")
    rollouts = as_rollouts(PROMPTS, RESPONSES)
    of_tokens = sum(len(p) + len(r) for p, r in zip(PROMPTS, RESPONSES, strict=True))
    _, head = counted(pair / "teacher", backward=False)
    without = step_flops(plan, rollouts, num_output_rows=0)
    found = step_flops(plan, rollouts, num_output_rows=of_tokens)
    assert found - without == pytest.approx(4 * head)
