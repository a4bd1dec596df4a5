import pytest
import torch

from megatron_oprd.bridge_build.sequences import number_rows, split_prompts
from megatron_oprd.config.schema import Alignment, TapConfig
from megatron_oprd.errors import UserError
from megatron_oprd.rollout.engine import Rollout


def rollouts() -> list[Rollout]:
    return [
        Rollout(
            prompt_index=i,
            sample_index=0,
            prompt_ids=(7,) * (2 + i),
            response_ids=(8,) * (1 + 3 * i),
            finished=True,
        )
        for i in range(5)
    ]


@pytest.mark.parametrize(("alignment", "shift"), [("predictor", -1), ("token", 0)])
def test_every_supervised_position_has_its_number(alignment: Alignment, shift: int) -> None:
    taps = TapConfig(positions="last_k", k=4, alignment=alignment)
    found = number_rows(rollouts(), taps, max_rows=None, seed=0)
    expected, number = [], 0
    for one in rollouts():
        marks = [0.0] * (len(one.prompt_ids) + len(one.response_ids))
        for position in range(len(marks) - min(4, len(one.response_ids)), len(marks)):
            number += 1
            marks[position + shift] = number
        expected.append(marks)
    assert [numbers.tolist() for numbers in found.row_numbers] == expected
    assert found.num_rows == number == 17
    assert [len(ids) for ids in found.token_ids] == [len(marks) for marks in expected]


def test_drawn_rows_are_a_seeded_sample() -> None:
    draws = [number_rows(rollouts(), TapConfig(), max_rows=6, seed=seed) for seed in (0, 0, 1)]
    drawn = [torch.cat(one.row_numbers) for one in draws]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    whole = torch.cat(number_rows(rollouts(), TapConfig(), max_rows=None, seed=0).row_numbers)
    for marks in drawn:
        assert marks[marks > 0].tolist() == [1, 2, 3, 4, 5, 6]
        assert bool((whole[marks > 0] > 0).all())


def test_held_out_prompts() -> None:
    prompts = [*range(50), *range(50)]
    found = split_prompts(prompts, share=0.1, seed=0)
    assert len(found) == 5
    assert found == split_prompts(sorted(prompts), share=0.1, seed=0)
    assert found != split_prompts(prompts, share=0.1, seed=1)
    assert len(split_prompts([1, 2], share=0.99, seed=0)) == 1
    with pytest.raises(UserError, match="single prompt"):
        split_prompts([3, 3], share=0.5, seed=0)
