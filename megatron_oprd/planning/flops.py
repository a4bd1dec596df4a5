"""Floating-point operations of a step of one data-parallel replica, as planned.

`megatron_oprd.models.flops` says what is counted.
"""

from dataclasses import dataclass

from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.flops import (
    attention_flops,
    backward_flops,
    linear_flops,
    lm_head_flops,
)
from megatron_oprd.planning.parameters import is_last_stage, num_recomputed
from megatron_oprd.planning.workload import Workload
from megatron_oprd.training.layout import RunLayout


@dataclass(frozen=True, kw_only=True)
class StageFlops:
    """FLOPs of one stage of a replica in a step, over all its ranks."""

    teacher: int  # forward pass
    student_forward: int
    student_backward: int
    student_recompute: int  # forward passes repeated in the backward pass

    @property
    def student(self) -> int:
        """FLOPs of all the student's passes."""
        return self.student_forward + self.student_backward + self.student_recompute


def stage_flops(layout: RunLayout, workload: Workload, stage: int) -> StageFlops:
    """FLOPs of a stage; virtual stages are numbered in the order in which a token passes them."""
    running = layout.running_layers_of_stage(stage)
    linear, attention = _forward(layout.student.architecture, workload, running)
    teacher = sum(
        _forward(
            layout.teacher.architecture,
            workload.of_teacher,
            layout.teacher.extent.layers_of_stage(stage),
        )
    )
    if layout.config.recompute.recompute_granularity == "selective":
        recompute = attention
    else:
        again = running[: num_recomputed(layout, stage)]
        recompute = sum(_forward(layout.student.architecture, workload, again))
    # The student's logits, and two products for the gradients of hidden states and head. The
    # teacher's logits are computed in the student's pass.
    rows = workload.output_rows * workload.num_micro_batches
    at_head = layout.compares_outputs and is_last_stage(layout, stage)
    logits = rows * lm_head_flops(layout.student.architecture) if at_head else 0
    of_teacher = rows * lm_head_flops(layout.teacher.architecture) if at_head else 0
    return StageFlops(
        teacher=teacher,
        student_forward=linear + attention + logits + of_teacher,
        student_backward=backward_flops(linear, attention) + 2 * logits,
        student_recompute=recompute,
    )


def prefill_flops(layout: RunLayout, workload: Workload) -> int:
    """FLOPs of the engines' forward pass over as many prompts as a replica has."""
    a, prompt = layout.student.architecture, workload.prompt_tokens
    of_sequence = prompt * linear_flops(a, range(a.num_layers))
    of_sequence += a.num_layers * attention_flops(a, first=0, last=prompt)
    return workload.num_sequences * (of_sequence + lm_head_flops(a))


def decode_flops(layout: RunLayout, workload: Workload) -> int:
    """FLOPs of decoding as many responses as a replica has."""
    a, prompt = layout.student.architecture, workload.prompt_tokens
    tokens = workload.response_tokens - 1  # the first comes from the prompt's forward pass
    of_sequence = tokens * linear_flops(a, range(a.num_layers))
    of_sequence += a.num_layers * attention_flops(a, first=prompt, last=prompt + tokens)
    return workload.num_sequences * (of_sequence + tokens * lm_head_flops(a))


def _forward(a: Architecture, workload: Workload, layers: range) -> tuple[int, int]:
    """FLOPs of some layers in a replica's step: linear layers, attention."""
    length = workload.prompt_tokens + workload.response_tokens
    attention = workload.num_sequences * attention_flops(a, first=0, last=length)
    return workload.tokens * linear_flops(a, layers), len(layers) * attention
