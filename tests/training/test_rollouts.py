"""Which prompts and which seeds a step has."""

from pathlib import Path

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.data.chat import ChatFormat
from megatron_oprd.data.prompts import Prompt, TeacherPrompts, load_prompts
from megatron_oprd.training.prompts import prompts_of_step
from megatron_oprd.training.rollouts import sampling_of_step
from tests.helpers.tiny import tiny_tokenizer


def test_a_prompt_that_comes_again_in_a_step_is_told_apart() -> None:
    config = RunConfig(seed=3)
    config.rollout.prompts_per_step = 7
    config.data.shuffle = False
    prompts = [Prompt(index=index, token_ids=(index + 5,)) for index in range(3)]
    found = prompts_of_step(0, prompts, config)
    assert [one.index for one in found] == [0, 1, 2, 0, 1, 2, 0]
    assert [one.occurrence for one in found] == [0, 0, 0, 1, 1, 1, 2]
    assert [one.occurrence for one in prompts_of_step(1, prompts, config)][:3] == [0, 0, 0]


def test_every_step_has_a_seed_of_its_own() -> None:
    config = RunConfig(seed=3)
    seeds = [sampling_of_step(step, config).seed for step in range(5)]
    assert len(set(seeds)) == 5


def test_long_prompts_of_the_teacher_are_its_own(tmp_path: Path) -> None:
    """Its limit is another one than the student's, and what is too long for it is left out."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "abc", "answer": "de"}\n{"prompt": "abc", "answer": "defghi"}\n')
    teacher = TeacherPrompts(
        tokenizer=tiny_tokenizer(),
        privileged_key="answer",
        template="{prompt}{privileged}",
        max_tokens=6,
        chat=ChatFormat(),
    )
    found = load_prompts(
        [file], tiny_tokenizer(), chat=ChatFormat(), max_prompt_tokens=3, teacher=teacher
    )
    assert [(one.index, len(one.token_ids), len(one.teacher_ids or ())) for one in found] == [
        (0, 3, 5)
    ]
