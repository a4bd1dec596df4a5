"""A step's micro-batches, without ranks: what is supervised, and how targets make groups."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_oprd.training.batches import StepBatches, make_micro_batches
from megatron_oprd.training.plan import RunPlan, make_plan
from tests.helpers.pairs import as_rollouts, config_of, save_pair

# One sequence is much longer than the others: one replica has most of the targets.
PROMPTS = [[5, 6]] * 4
RESPONSES = [[7] * 40, [7] * 8, [7] * 8, [7] * 8]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("batches")
    save_pair(root / "llama", "llama")
    save_pair(root / "shallow", "llama", teacher_layers=2)
    save_pair(root / "vocabulary", "llama", teacher_vocab_size=150)
    return root


def plan_of(pairs: Path, *overrides: str, pair: str = "llama", ranks: int = 2) -> RunPlan:
    return make_plan(config_of(pairs / pair, list(overrides)), world_size=ranks)


def batches(plan: RunPlan, rank: int = 0, **step: Any) -> StepBatches:
    context: Any = SimpleNamespace(
        dp_rank=rank,
        dp_size=plan.layout.data_parallel_size,
        pp_size=1,
        cp_rank=0,
        cp_size=1,
        device=torch.device("cpu"),
    )
    return make_micro_batches(
        plan,
        context,
        as_rollouts(PROMPTS, RESPONSES, step.get("teacher_sequences"), step.get("taught_by")),
    )


def test_groups_fit_the_replica_with_the_most_targets(pairs: Path) -> None:
    """Both replicas make the same groups, and the fullest one's targets fit."""
    plan = plan_of(pairs, "batch.micro_batch_size=1")
    of_one = 8 * plan.layout.target_bytes_per_row
    # Replicas have 40 + 8 and 8 + 8 rows.
    for budget, groups in ((48 * plan.layout.target_bytes_per_row, 1), (3 * of_one, 2)):
        memory = f"teacher.target_memory_gb={budget / 1e9:.12f}"
        limited = plan_of(pairs, "batch.micro_batch_size=1", memory)
        assert [len(batches(limited, rank).groups) for rank in (0, 1)] == [groups] * 2


def test_targets_of_both_losses_add_up(pairs: Path) -> None:
    settings = ["batch.micro_batch_size=1", "output_loss.kind=reverse_kl"]
    plan = plan_of(pairs, *settings, ranks=1)
    rows = sum(map(len, RESPONSES))
    states = rows * plan.layout.target_bytes_per_row
    outputs = rows * plan.layout.output_target_bytes_per_row
    for budget, is_enough in ((states + outputs, True), (states + outputs - 1, False)):
        memory = f"teacher.target_memory_gb={budget / 1e9:.12f}"
        found = len(batches(plan_of(pairs, *settings, memory, ranks=1)).groups)
        assert (found == 1) == is_enough


def test_a_teacher_layer_that_several_layers_want_is_kept_once(pairs: Path) -> None:
    itemsize, width = 4, 32
    assert plan_of(pairs).layout.target_bytes_per_row == 4 * width * itemsize
    assert plan_of(pairs, pair="shallow").layout.target_bytes_per_row == 2 * width * itemsize


def test_distributions_are_over_what_both_vocabularies_have(pairs: Path) -> None:
    plan = plan_of(pairs, "output_loss.kind=reverse_kl", pair="vocabulary")
    assert plan.layout.vocab_size == 97


def test_output_losses_have_positions_of_their_own(pairs: Path) -> None:
    settings = ["output_loss.kind=reverse_kl", "output_loss.positions=last_k"]
    plan = plan_of(pairs, *settings, "output_loss.positions_k=3", ranks=1)
    ((one,),) = batches(plan).groups
    assert one.weights is not None
    assert one.weights.outputs is not None
    assert (one.weights.outputs > 0).sum(dim=1).tolist() == [3] * 4
    assert sorted((one.weights.states > 0).sum(dim=1).tolist()) == [8, 8, 8, 40]


@pytest.mark.parametrize(("packed", "number"), [(True, 1), (False, 2)])
def test_a_budget_counts_padding_only_where_there_is_some(
    pairs: Path, packed: bool, number: int
) -> None:
    """72 tokens; padded to 42 each they are 168."""
    packing = f"batch.sequence_packing={str(packed).lower()}"
    (group,) = batches(plan_of(pairs, "batch.max_tokens=80", packing, ranks=1)).groups
    assert len(group) == number


def test_what_a_step_supervises(pairs: Path) -> None:
    teacher = pairs / "llama" / "teacher"
    extra = f"extra_teachers=[{{model: {teacher}, prompt_share: 0.5}}]"
    plan = plan_of(pairs, extra, "teacher.prompt_share=0.5", ranks=1)
    everything, nothing = [True] * 4, [False] * 4
    both = batches(plan, taught_by=[[True, True, False, False], [False, False, True, True]])
    assert (both.supervises, both.supervises_outputs, both.is_empty) == ([True] * 2, False, False)
    second = batches(plan, taught_by=[nothing, everything])
    assert (second.supervises, second.is_empty) == ([False, True], False)
    neither = batches(plan, taught_by=[nothing, nothing])
    assert (neither.supervises, neither.is_empty) == ([False, False], True)
