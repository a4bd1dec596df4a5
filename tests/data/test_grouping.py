from collections import Counter

from megatron_oprd.data.grouping import grouped_indices

GROUPS = ["a"] * 6 + ["b"] * 3 + ["c"]


def steps(count: int, *, prompts_per_step: int = 2, seed: int = 1) -> list[list[int]]:
    return [
        grouped_indices(step, GROUPS, prompts_per_step=prompts_per_step, seed=seed)
        for step in range(count)
    ]


def test_a_step_has_one_group_and_groups_have_their_share() -> None:
    of_steps = [{GROUPS[i] for i in indices} for indices in steps(20)]
    assert all(len(groups) == 1 for groups in of_steps)
    turns = Counter(group for groups in of_steps for group in groups)
    assert turns == {"a": 12, "b": 6, "c": 2}


def test_each_epoch_of_a_group_has_each_of_its_prompts_once() -> None:
    of_a = [i for indices in steps(20) for i in indices if GROUPS[i] == "a"]
    assert [sorted(of_a[i : i + 6]) for i in range(0, 24, 6)] == [list(range(6))] * 4
    assert of_a[:6] != of_a[6:12]


def test_a_step_depends_on_its_number_and_the_seed_alone() -> None:
    assert steps(12)[7] == grouped_indices(7, GROUPS, prompts_per_step=2, seed=1)
    assert steps(12) != steps(12, seed=2)
    in_order = grouped_indices(0, GROUPS, prompts_per_step=3, seed=1, shuffle=False)
    assert in_order == [0, 1, 2]


def test_a_small_group_repeats_its_prompts() -> None:
    found = steps(12, prompts_per_step=3)
    assert [9, 9, 9] in found
