"""Floating-point operations of a step of one data-parallel replica.

A multiplication and an addition count as two. Counted are the matrix products of linear layers and
of causal attention (only the causal half); norms, rotary embeddings and losses are omitted. A
backward pass costs twice its forward pass, attention's 2.5 times, because it recomputes the scores.
"""

from dataclasses import dataclass

from megatron_oprd.models.architecture import Architecture
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


def linear_flops(a: Architecture) -> int:
    """FLOPs of one layer's linear layers for one token."""
    q, kv = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    attention = a.hidden_size * (q + 2 * kv) + q * a.hidden_size
    if a.moe is None:
        mlp = 3 * a.hidden_size * a.ffn_hidden_size
    else:
        moe = a.moe
        mlp = 3 * a.hidden_size * moe.ffn_hidden_size * moe.num_experts_per_token
        mlp += 3 * a.hidden_size * (moe.shared_ffn_hidden_size or 0)
        # The router, and the shared expert's gate.
        mlp += a.hidden_size * (moe.num_experts + moe.shared_expert_gate)
    return 2 * (attention + mlp)


def attention_flops(a: Architecture, *, first: int, last: int) -> int:
    """FLOPs of one layer's attention core, for tokens ``first`` to ``last`` - 1 of a sequence.

    Where some layers have a sliding window, of the mean layer.
    """
    # Pairs: token t (from 0) attends to t + 1 tokens.
    looks = (last * (last + 1) - first * (first + 1)) // 2
    if a.sliding_window is not None:
        # Of the tokens from the window's length on, each attends to t + 1 - window fewer.
        hidden = [max(0, end - a.sliding_window) for end in (first, last)]
        fewer = (hidden[1] * (hidden[1] + 1) - hidden[0] * (hidden[0] + 1)) // 2
        looks -= fewer * sum(a.sliding_layers) // a.num_layers
    # Two products (scores, and their product with the values), two operations each.
    return 4 * a.num_attention_heads * a.head_dim * looks


def stage_flops(layout: RunLayout, workload: Workload, stage: int) -> StageFlops:
    """FLOPs of a stage; virtual stages are numbered in the order in which a token passes them."""
    teacher_layers = layout.teacher.extent.layers_per_stage[stage]
    running = layout.running_per_stage[stage]
    linear, attention = _forward(layout.student.architecture, workload)
    teacher = sum(_forward(layout.teacher.architecture, workload))
    if layout.config.recompute.recompute_granularity == "selective":
        recompute = attention * running
    else:
        recompute = (linear + attention) * num_recomputed(layout, stage)
    # The student's logits, and two products for the gradients of hidden states and head. The
    # teacher's logits are computed in the student's pass.
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
    """FLOPs of the engines' forward pass over as many prompts as a replica has."""
    a, prompt = layout.student.architecture, workload.prompt_tokens
    of_sequence = a.num_layers * (
        prompt * linear_flops(a) + attention_flops(a, first=0, last=prompt)
    )
    return workload.num_sequences * (of_sequence + _lm_head(a))


def decode_flops(layout: RunLayout, workload: Workload) -> int:
    """FLOPs of decoding as many responses as a replica has."""
    a, prompt = layout.student.architecture, workload.prompt_tokens
    tokens = workload.response_tokens - 1  # the first comes from the prompt's forward pass
    of_sequence = a.num_layers * (
        tokens * linear_flops(a) + attention_flops(a, first=prompt, last=prompt + tokens)
    )
    return workload.num_sequences * (of_sequence + tokens * _lm_head(a))


def _lm_head(a: Architecture) -> int:
    return 2 * a.hidden_size * a.vocab_size


def _forward(a: Architecture, workload: Workload) -> tuple[int, int]:
    """FLOPs of one layer in a replica's step: linear layers, attention."""
    length = workload.prompt_tokens + workload.response_tokens
    attention = workload.num_sequences * attention_flops(a, first=0, last=length)
    return workload.tokens * linear_flops(a), attention
