"""Steps whose prompts all have one value of a column (``data.group_by``)."""

from collections.abc import Hashable, Sequence

from megatron_oprd.data.prompts import prompt_indices


def grouped_indices(
    step: int,
    groups: Sequence[Hashable],
    *,
    prompts_per_step: int,
    seed: int,
    shuffle: bool = True,
) -> list[int]:
    """The prompts of one training step, all of one group, as positions in ``groups``.

    Groups take turns in proportion to their prompts, and each has a stream of its own, as in
    `prompt_indices`. Like there, a step's prompts depend on the step number alone.

    Args:
        step: The step, from 0.
        groups: The group of each prompt.
        prompts_per_step: Prompts of a step; a small group is repeated until there are so many.
        seed: Of the permutations.
        shuffle: Whether each epoch of a group is a permutation.
    """
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    done = dict.fromkeys(members, 0)
    turn = None
    for number in range(step + 1):
        # The group that is furthest behind its share; the first in the files if several are.
        turn = max(
            members, key=lambda one: len(members[one]) * (number + 1) - done[one] * len(groups)
        )
        done[turn] += 1
    assert turn is not None
    indices = prompt_indices(
        done[turn] - 1,
        num_prompts=len(members[turn]),
        prompts_per_step=prompts_per_step,
        seed=seed,
        shuffle=shuffle,
    )
    return [members[turn][i] for i in indices]
