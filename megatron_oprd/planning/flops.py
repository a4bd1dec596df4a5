"""Floating-point operations of a step, of one data-parallel replica.

A multiplication and an addition are two. Counted are the matrix products of the linear layers and
of attention, whose causal half only; norms, rotations and the loss are left out. The backward pass
costs twice the forward pass, attention's two and a half times (it computes the scores again).
"""

from dataclasses import dataclass

from megatron_oprd.models.architecture import Architecture
from megatron_oprd.planning.parameters import is_last_stage, num_recomputed, num_running
from megatron_oprd.planning.workload import Workload
from megatron_oprd.training.layout import RunLayout


@dataclass(frozen=True, kw_only=True)
class StageFlops:
    """What one stage of a replica computes in a step, all its ranks together.

    Attributes:
        teacher: The teacher's forward pass.
        student_forward: The student's forward pass.
        student_backward: Its backward pass.
        student_recompute: What of the forward pass the backward pass does again.
    """

    teacher: int
    student_forward: int
    student_backward: int
    student_recompute: int

    @property
    def student(self) -> int:
        """The student's passes together."""
        return self.student_forward + self.student_backward + self.student_recompute


def linear_flops(a: Architecture) -> int:
    """Of one layer's linear layers, for one token."""
    q, kv = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    attention = a.hidden_size * (q + 2 * kv) + q * a.hidden_size
    if a.moe is None:
        mlp = 3 * a.hidden_size * a.ffn_hidden_size
    else:
        moe = a.moe
        mlp = 3 * a.hidden_size * moe.ffn_hidden_size * moe.num_experts_per_token
        mlp += a.hidden_size * moe.num_experts
    return 2 * (attention + mlp)


def attention_flops(a: Architecture, *, first: int, last: int) -> int:
    """Of one layer's attention core, for a sequence's tokens ``first`` to ``last`` (not included).

    Each token looks at itself and at all before it.
    """
    looks = (last * (last + 1) - first * (first + 1)) // 2
    return 4 * a.num_attention_heads * a.head_dim * looks


def stage_flops(layout: RunLayout, workload: Workload, stage: int) -> StageFlops:
    """What a stage (virtual stages in the order a token passes them) computes."""
    teacher_layers = layout.teacher.extent.layers_per_stage[stage]
    running = num_running(layout, stage)
    linear, attention = _forward(layout.student.architecture, workload)
    teacher = sum(_forward(layout.teacher.architecture, workload))
    if layout.config.recompute.recompute_granularity == "selective":
        recompute = attention * running
    else:
        recompute = (linear + attention) * num_recomputed(layout, stage)
    # Logits; their gradients, of the hidden states and of the head. The teacher's are computed
    # beside the student's.
    rows = workload.output_rows * workload.num_micro_batches
    at_head = layout.compares_outputs and is_last_stage(layout, stage)
    logits = rows * _lm_head(layout.student.architecture) if at_head else 0
    of_teacher = rows * _lm_head(layout.teacher.architecture) if at_head else 0
    return StageFlops(
        teacher=teacher * teacher_layers,
        student_forward=(linear + attention) * running + logits + of_teacher,
        student_backward=(2 * linear + 5 * attention // 2) * running + 2 * logits,
        student_recompute=recompute,
    )


def prefill_flops(layout: RunLayout, workload: Workload) -> int:
    """Of the rollout engine's forward pass over a replica's prompts."""
    a, prompt = layout.student.architecture, workload.prompt_tokens
    of_sequence = a.num_layers * (
        prompt * linear_flops(a) + attention_flops(a, first=0, last=prompt)
    )
    return workload.num_sequences * (of_sequence + _lm_head(a))


def decode_flops(layout: RunLayout, workload: Workload) -> int:
    """Of a replica's responses, token by token."""
    a, prompt = layout.student.architecture, workload.prompt_tokens
    tokens = workload.response_tokens - 1  # the first comes from the prompt's forward pass
    of_sequence = a.num_layers * (
        tokens * linear_flops(a) + attention_flops(a, first=prompt, last=prompt + tokens)
    )
    return workload.num_sequences * (of_sequence + tokens * _lm_head(a))


def _lm_head(a: Architecture) -> int:
    return 2 * a.hidden_size * a.vocab_size


def _forward(a: Architecture, workload: Workload) -> tuple[int, int]:
    """Of one layer, for a replica's step: linear layers, attention."""
    length = workload.prompt_tokens + workload.response_tokens
    attention = workload.num_sequences * attention_flops(a, first=0, last=length)
    return workload.tokens * linear_flops(a), attention
