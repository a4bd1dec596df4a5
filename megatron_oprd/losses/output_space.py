"""On-policy distillation in output space (OPD): distances between next-token distributions.

Every loss gives a value for each position and its gradient with respect to the student's
log-probabilities' logits in closed form, so that no graph is kept and a chunk of positions needs a
few matrices [n, v] and no more. p is the student's distribution, q the teacher's, both after their
temperatures. Shape suffixes: n positions, v this rank's columns, k tokens of a support.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oprd.config_losses import OutputLossConfig, Support, SupportWeights
from megatron_oprd.losses.vocabulary import (
    VocabularyShard,
    gather,
    log_softmax,
    scatter,
    top_k,
)


@dataclass(frozen=True, kw_only=True)
class Distance:
    """What a loss is at each position.

    Attributes:
        value: [n], the same on every rank of the shard's group.
        gradient: With respect to this rank's student logits [n, v].
    """

    value: Tensor
    gradient: Tensor


def output_space_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    shard: VocabularyShard,
    settings: OutputLossConfig,
) -> Distance:
    """The distance of two distributions at every position.

    Communicates on the shard's group. Everything is in fp32, or fp64 for fp64 logits.

    Args:
        student_logits: This rank's columns of the raw logits [n, v], any floating dtype.
        teacher_logits: Likewise, of the same columns.
        labels: The token that was sampled at each position [n], int64; for ``sampled_token``.
        shard: This rank's columns.
        settings: The loss, without its coefficient.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = log_softmax(student_logits.to(dtype) / settings.student_temperature, shard)
    log_q = log_softmax(teacher_logits.to(dtype) / settings.teacher_temperature, shard)
    match settings.kind:
        case "sampled_token":
            found = sampled_token(log_p, log_q, labels, shard)
        case "top_k":
            found = top_k_reverse_kl(
                log_p,
                log_q,
                shard,
                k=settings.k,
                support=settings.support,
                weights=settings.support_weights,
            )
        case "reverse_kl":
            found = reverse_kl(log_p, log_q, shard)
        case "forward_kl":
            found = forward_kl(log_p, log_q, shard)
        case "jsd":
            found = jsd(log_p, log_q, shard, beta=settings.beta)
        case _:
            raise ValueError(f"there is no output-space loss {settings.kind!r}")
    return Distance(value=found.value, gradient=found.gradient / settings.student_temperature)


def reverse_kl(log_p: Tensor, log_q: Tensor, shard: VocabularyShard) -> Distance:
    """KL(p || q) over the whole vocabulary; gradients are those of the logits of ``log_p``."""
    p, log_ratio = log_p.exp(), log_p - log_q
    value = shard.sum((p * log_ratio).sum(dim=1))
    return Distance(value=value, gradient=p * (log_ratio - value[:, None]))


def forward_kl(log_p: Tensor, log_q: Tensor, shard: VocabularyShard) -> Distance:
    """KL(q || p) over the whole vocabulary."""
    q = log_q.exp()
    value = shard.sum((q * (log_q - log_p)).sum(dim=1))
    return Distance(value=value, gradient=log_p.exp() - q)


def jsd(log_p: Tensor, log_q: Tensor, shard: VocabularyShard, *, beta: float) -> Distance:
    """The generalised Jensen-Shannon divergence (Agarwal et al., arXiv:2306.13649, eq. 1).

    beta * KL(q || m) + (1 - beta) * KL(p || m) with m = beta * q + (1 - beta) * p, 0 < beta < 1.
    """
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    p = log_p.exp()
    of_teacher = shard.sum((log_q.exp() * (log_q - log_m)).sum(dim=1))
    log_ratio = log_p - log_m
    of_student = shard.sum((p * log_ratio).sum(dim=1))
    return Distance(
        value=beta * of_teacher + (1 - beta) * of_student,
        gradient=(1 - beta) * p * (log_ratio - of_student[:, None]),
    )


def sampled_token(log_p: Tensor, log_q: Tensor, labels: Tensor, shard: VocabularyShard) -> Distance:
    """The policy gradient with advantage log q(y) - log p(y) of the sampled token y.

    The value is log p(y) - log q(y), whose mean over rollouts of the student estimates KL(p || q).
    The gradient is that value, detached, times the gradient of log p(y); differentiating the value
    itself would give a gradient whose expectation is zero.
    """
    ids = labels[:, None]
    value = gather(log_p - log_q, ids, shard)
    gradient = scatter(value, ids, shard) - value * log_p.exp()
    return Distance(value=value[:, 0], gradient=gradient)


def top_k_reverse_kl(
    log_p: Tensor,
    log_q: Tensor,
    shard: VocabularyShard,
    *,
    k: int,
    support: Support,
    weights: SupportWeights,
) -> Distance:
    """Reverse KL of both distributions renormalised on a support of a few tokens.

    The value is the sum of w * (log p - log q) over the support, with p and q renormalised on it.
    The gradient is the policy gradient with the same terms, detached, as (negative) advantages:
    sum of [w * (log p - log q)] * grad log p. With w = p it is the exact gradient of the
    renormalised KL. (The reference implementation takes log p and log q before renormalisation.)

    Args:
        log_p: [n, v].
        log_q: [n, v].
        shard: This rank's columns.
        k: Tokens that are taken of a model.
        support: The student's k most likely tokens, the teacher's, those in both, or in either.
        weights: w: the renormalised p, the renormalised q, or the same for all of the support.

    Returns:
        Value and gradient; both are 0 at positions with an empty support.
    """
    ids, is_in = _support(log_p, log_q, shard, k=k, support=support)
    log_p_k = _renormalised(gather(log_p, ids, shard), is_in)
    log_q_k = _renormalised(gather(log_q, ids, shard), is_in)
    p = log_p_k.exp()
    match weights:
        case "student_p":
            w = p
        case "teacher_p":
            w = log_q_k.exp()
        case "none":
            w = is_in.to(p.dtype) / is_in.sum(dim=1, keepdim=True).clamp(min=1)
    terms = torch.where(is_in, w * (log_p_k - log_q_k), 0)
    value = terms.sum(dim=1)
    return Distance(value=value, gradient=scatter(terms - p * value[:, None], ids, shard))


def _support(
    log_p: Tensor, log_q: Tensor, shard: VocabularyShard, *, k: int, support: Support
) -> tuple[Tensor, Tensor]:
    """Tokens [n, k or 2k], and which of them count; each counts at most once."""
    if support == "only_tch":
        ids = top_k(log_q, k, shard)
        return ids, torch.ones_like(ids, dtype=torch.bool)
    ids = top_k(log_p, k, shard)
    if support == "only_stu":
        return ids, torch.ones_like(ids, dtype=torch.bool)
    of_teacher = top_k(log_q, k, shard)
    same = ids[:, :, None] == of_teacher[:, None, :]  # [n, k, k]
    if support == "intersection":
        return ids, same.any(dim=2)
    return (
        torch.cat([ids, of_teacher], dim=1),
        torch.cat([torch.ones_like(ids, dtype=torch.bool), ~same.any(dim=1)], dim=1),
    )


def _renormalised(log_probabilities: Tensor, is_in: Tensor) -> Tensor:
    """Log-probabilities [n, k] that sum to one over the support; -inf outside of it."""
    inside = log_probabilities.masked_fill(~is_in, -torch.inf)
    total = inside.logsumexp(dim=1, keepdim=True)
    return inside - torch.where(is_in.any(dim=1, keepdim=True), total, 0)
