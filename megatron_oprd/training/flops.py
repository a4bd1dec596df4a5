"""Floating-point operations of a step's passes over the sequences that it really has."""

from collections.abc import Sequence

from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.flops import (
    attention_flops,
    backward_flops,
    linear_flops,
    lm_head_flops,
)
from megatron_oprd.rollout.engine import Rollout, teacher_sequences_of
from megatron_oprd.training.plan import RunPlan


def step_flops(plan: RunPlan, rollouts: Sequence[Rollout], *, num_output_rows: int) -> int:
    """FLOPs of teachers' and student's passes over the global batch, of all ranks together.

    Padding and recomputed layers do not count: they are work that a layout adds.

    Args:
        plan: The run.
        rollouts: The step's, of all replicas.
        num_output_rows: Positions of the output-space loss.
    """
    layout = plan.layout
    read_by_student = [len(one.prompt_ids) + len(one.response_ids) for one in rollouts]
    of_teacher = teacher_sequences_of(rollouts)
    read_by_teacher = read_by_student
    if of_teacher is not None:
        read_by_teacher = [len(one.prompt_ids) + len(one.response_ids) for one in of_teacher]
    running = range(layout.num_running_layers)
    linear, attention = _layers(layout.student.architecture, running, read_by_student)
    total = linear + attention + backward_flops(linear, attention)
    for number, teacher in enumerate(plan.teachers):
        model = teacher.layout.teacher
        # Only the first teacher may read other sequences. All read all sequences of the step, also
        # those that another teaches.
        lengths = read_by_student if number else read_by_teacher
        built = range(sum(model.extent.layers_per_stage))
        total += sum(_layers(model.architecture, built, lengths))
    if layout.compares_outputs:
        # The head's backward pass has two products: for the hidden states, and for its weight.
        of_row = 3 * lm_head_flops(layout.student.architecture)
        total += num_output_rows * (of_row + lm_head_flops(layout.teacher.architecture))
    return total


def _layers(a: Architecture, layers: range, lengths: Sequence[int]) -> tuple[int, int]:
    """FLOPs of some layers' forward pass: linear layers, attention."""
    attention = sum(attention_flops(a, first=0, last=length) for length in lengths)
    return sum(lengths) * linear_flops(a, layers), len(layers) * attention
