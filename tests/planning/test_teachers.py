"""Plans with several teachers, and with one that reads sequences of its own; checkpoints."""

from collections.abc import Callable

import pytest

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.planning.activations import KERNELS
from megatron_oprd.planning.checkpoint import checkpoint_bytes
from megatron_oprd.planning.estimate import (
    MemoryEstimate,
    WorkEstimate,
    estimate_memory,
    estimate_work,
    read_models,
)
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.memory import teacher_bytes


def planned(config: RunConfig) -> tuple[MemoryEstimate, WorkEstimate]:
    kernels = KERNELS["transformer_engine"]
    memory = estimate_memory(config, read_models(config), kernels, num_gpus=8, memory_gb=80)
    work = estimate_work(memory.layouts, Hardware(), prompt_tokens=1024, response_tokens=8192)
    return memory, work


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_another_teacher(qwen: Callable[..., RunConfig], offload: str) -> None:
    """The same teacher twice: twice its time and targets; of offloaded weights one at a time."""
    plain = qwen(f"teacher.offload={offload}", "teacher.target_memory_gb=null")
    extra = f"extra_teachers=[{{model: {plain.model.teacher}}}]"
    both = qwen(f"teacher.offload={offload}", "teacher.target_memory_gb=null", extra)
    (one, work), (two, more) = planned(plain), planned(both)
    assert more.seconds.teacher.total == pytest.approx(2 * work.seconds.teacher.total)
    assert more.seconds.student == work.seconds.student
    for before, after in zip(one.ranks, two.ranks, strict=True):
        old, new = before.phases["teacher"], after.phases["teacher"]
        assert new["targets"] == 2 * old["targets"]
        times = 2 if offload == "none" else 1
        assert new["teacher weights"] == times * old["teacher weights"]
        assert new["workspace"] == old["workspace"]
        # Gradients at the taps of both teachers.
        taps = after.phases["student"]["activations"] - before.phases["student"]["activations"]
        assert taps > 0
        assert after.host_bytes == (2 * before.host_bytes if offload == "cpu" else 0)


def test_targets_of_all_teachers_share_the_limit(qwen: Callable[..., RunConfig]) -> None:
    plain = qwen("teacher.target_memory_gb=8")
    both = qwen("teacher.target_memory_gb=8", f"extra_teachers=[{{model: {plain.model.teacher}}}]")
    one, two = planned(plain)[0].largest, planned(both)[0].largest
    assert two.group_size == one.group_size // 2


def test_a_teacher_that_reads_more(qwen: Callable[..., RunConfig]) -> None:
    """4096 tokens of prompt instead of 1024: sequences of 12288 instead of 9216."""
    own = ["teacher_prompt.privileged_key=solution", "teacher_prompt.max_tokens=4096"]
    (one, work), (two, more) = planned(qwen()), planned(qwen(*own))
    longer = 12288 / 9216
    ratio = more.seconds.teacher.compute / work.seconds.teacher.compute
    assert longer < ratio < longer**2
    expected = longer * work.seconds.teacher.tensor + EXCHANGE_SECONDS
    assert more.seconds.teacher.tensor == pytest.approx(expected)
    assert more.seconds.student == work.seconds.student
    assert more.seconds.rollout == work.seconds.rollout
    before, after = (found.ranks[0].phases["teacher"]["workspace"] for found in (one, two))
    assert after > before


# Of 64 sequences of a replica 2000 positions, in 36 layers of 5120 numbers in bf16: all four ranks
# that share them sum them, at 370 GB/s.
EXCHANGE_SECONDS = 2 * 3 / 4 * 64 * 2000 * 36 * 5120 * 2 / 370e9


def test_teachers_that_read_several_micro_batches_together(qwen: Callable[..., RunConfig]) -> None:
    """Four of the student's, of two sequences each."""
    everything = "teacher.target_memory_gb=null"
    (one, work), (two, more) = (
        planned(qwen(everything, *setting)) for setting in ((), ("teacher.max_tokens=73728",))
    )
    assert (one.largest.num_micro_batches, one.largest.micro_batch_size) == (32, 2)
    of_teacher = two.largest.of_teacher
    assert (of_teacher.num_micro_batches, of_teacher.micro_batch_size) == (8, 8)
    before, after = (found.ranks[0].phases for found in (one, two))
    # Nothing but the workspace grows, without its part that decodes a weight.
    decoding = teacher_bytes(one.layout, pp_rank=0, itemsize=2).decoding
    assert after["teacher"]["workspace"] - decoding == pytest.approx(
        4 * (before["teacher"]["workspace"] - decoding)
    )
    assert after["teacher"] | {"workspace": 0} == before["teacher"] | {"workspace": 0}
    assert after["student"] == before["student"]
    seconds, longer = work.seconds.teacher, more.seconds.teacher
    assert longer.compute == seconds.compute
    assert longer.tensor == pytest.approx(seconds.tensor + EXCHANGE_SECONDS)
    assert more.seconds.student == work.seconds.student


def test_fewer_micro_batches_make_a_longer_bubble(qwen: Callable[..., RunConfig]) -> None:
    sizes = [
        "teacher.target_memory_gb=null",
        "parallel.pipeline_model_parallel_size=4",
        "parallel.tensor_model_parallel_size=2",
    ]
    (_, work), (_, more) = (
        planned(qwen(*sizes, *setting)) for setting in ((), ("teacher.max_tokens=73728",))
    )
    for found, count in ((work.seconds.teacher, 64), (more.seconds.teacher, 16)):
        assert found.bubble == pytest.approx(3 / count * (found.compute + found.messages))
    assert more.seconds.student == work.seconds.student


def test_checkpoint(qwen: Callable[..., RunConfig]) -> None:
    """Two bytes a parameter, and twelve of its states; in every layout the same."""
    expected = 4_022_468_096 * (2 + 12)
    for sizes in ([], ["parallel.pipeline_model_parallel_size=2"]):
        found = checkpoint_bytes(planned(qwen(*sizes))[0].layout)
        assert found == pytest.approx(expected, rel=1e-3)  # with the rows that pad the vocabulary
