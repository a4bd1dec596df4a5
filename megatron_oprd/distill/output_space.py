"""On-policy distillation in output space (OPD): distances between next-token distributions.

Every loss returns a value for each position and its gradient with respect to the student's logits,
in closed form: no graph is kept, and a chunk of positions needs a few matrices [n, v]. p is the
student's distribution, q the teacher's, both after their temperatures. The vocabulary's columns are
sharded over the tensor-parallel ranks, and all functions except `scatter` communicate on the
shard's group. Shapes: n positions, v columns of this rank, k tokens of a support.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.config.schema import OutputLossConfig, Support, SupportWeights, TopKVariant


@dataclass(frozen=True, kw_only=True)
class VocabularyShard:
    """This rank's columns of the vocabulary, without padding."""

    start: int  # the first column
    size: int  # may be 0 on the last ranks of a very small vocabulary
    group: dist.ProcessGroup  # tensor-parallel

    @classmethod
    def of(
        cls, *, vocab_size: int, padded_vocab_size: int, group: dist.ProcessGroup
    ) -> "VocabularyShard":
        """This rank's part of the first ``vocab_size`` of ``padded_vocab_size`` columns."""
        width = padded_vocab_size // group.size()
        start = group.rank() * width
        return cls(start=start, size=min(max(vocab_size - start, 0), width), group=group)

    def sum(self, value: Tensor) -> Tensor:
        """Sums ``value`` (any shape) elementwise over the ranks, in place."""
        if self.group.size() > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def max(self, value: Tensor) -> Tensor:
        """Takes the elementwise maximum over the ranks, in place."""
        if self.group.size() > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value


def log_softmax(logits: Tensor, shard: VocabularyShard) -> Tensor:
    """Log-probabilities of this rank's columns, normalised over all ranks: [n, v] --> [n, v]."""
    # amax() fails on no columns, but the rank has to join the reduction.
    no_column = logits.new_full((len(logits), 1), -torch.inf)
    largest = (logits if shard.size else no_column).amax(dim=1)
    # [n] maxima, then [n] sums are communicated.
    centred = logits - shard.max(largest)[:, None]
    return centred - shard.sum(centred.exp().sum(dim=1)).log()[:, None]


def gather(values: Tensor, ids: Tensor, shard: VocabularyShard) -> Tensor:
    """Values [n, v] at the columns ``ids`` [n, k] of the whole vocabulary --> [n, k].

    ``ids`` is int64 and the same on every rank; so is the result.
    """
    local, is_here = _local(ids, shard)
    found = values.new_zeros(ids.shape)
    if shard.size:
        found = torch.where(is_here, values.gather(1, local), 0)
    return shard.sum(found)


def scatter(values: Tensor, ids: Tensor, shard: VocabularyShard) -> Tensor:
    """Puts values into this rank's columns ``ids``: [n, k] --> [n, v]; sums repeated ids."""
    local, is_here = _local(ids, shard)
    result = values.new_zeros(len(ids), shard.size)
    if shard.size:
        result.scatter_add_(1, local, torch.where(is_here, values, 0))
    return result


def top_k(values: Tensor, k: int, shard: VocabularyShard) -> Tensor:
    """The columns with the k largest values over all ranks: [n, v] --> [n, k], largest first."""
    here = min(k, shard.size)
    # Only k candidates of each rank are communicated, not the columns.
    best, ids = values.topk(here, dim=1)
    ids = ids + shard.start
    size = shard.group.size()
    if size == 1:
        return ids
    # all_gather needs the same shape from ranks with fewer than k columns. -inf is never chosen.
    best = torch.nn.functional.pad(best, (0, k - here), value=-torch.inf)
    ids = torch.nn.functional.pad(ids, (0, k - here))
    all_best = [torch.empty_like(best) for _ in range(size)]
    all_ids = [torch.empty_like(ids) for _ in range(size)]
    dist.all_gather(all_best, best.contiguous(), group=shard.group)
    dist.all_gather(all_ids, ids.contiguous(), group=shard.group)
    chosen = torch.cat(all_best, dim=1).topk(k, dim=1).indices
    return torch.cat(all_ids, dim=1).gather(1, chosen)


def _local(ids: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """``ids`` relative to this rank's first column (0 if elsewhere), and whether they are here."""
    local = ids - shard.start
    is_here = (local >= 0) & (local < shard.size)
    return torch.where(is_here, local, 0), is_here


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A loss at each position."""

    value: Tensor  # [n], the same on every rank of the shard's group
    gradient: Tensor  # [n, v], with respect to this rank's student logits


def output_space_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    shard: VocabularyShard,
    settings: OutputLossConfig,
) -> Distance:
    """The distance between two distributions at every position, in fp32 (fp64 for fp64 logits).

    Args:
        student_logits: This rank's columns of the raw logits [n, v], any floating dtype.
        teacher_logits: The same columns of the teacher's raw logits [n, v].
        labels: The sampled token at each position [n], int64; used by ``sampled_token`` only.
        shard: This rank's columns.
        settings: The loss; its coefficient is not applied.
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
                variant=settings.top_k_variant,
            )
        case "reverse_kl":
            found = reverse_kl(log_p, log_q, shard)
        case "forward_kl":
            found = forward_kl(log_p, log_q, shard)
        case "jsd":
            found = jsd(log_p, log_q, shard, beta=settings.beta)
        case _:
            raise ValueError(f"there is no output-space loss {settings.kind!r}")
    # The chain rule through logits / temperature. The value is not rescaled.
    return Distance(value=found.value, gradient=found.gradient / settings.student_temperature)


def reverse_kl(log_p: Tensor, log_q: Tensor, shard: VocabularyShard) -> Distance:
    """KL(p || q) over the whole vocabulary."""
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
    The gradient is that value, detached, times the gradient of log p(y).
    """
    ids = labels[:, None]
    value = gather(log_p - log_q, ids, shard)
    # Not the derivative of the value: its expectation would be zero.
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
    variant: TopKVariant,
) -> Distance:
    """Reverse KL of both distributions, on a support of a few tokens.

    The value is the sum of w * (log p - log q) over the support. The gradient is the policy
    gradient with the same terms, detached, as negative advantages: the sum of
    [w * (log p - log q)] * grad log p. In ``renormalised`` p and q are renormalised on the support;
    with w = p the gradient is then the exact one of the renormalised KL. In ``reference`` they are
    not, as in the reference implementation. Both are 0 at positions with an empty support.

    Args:
        log_p: [n, v].
        log_q: [n, v].
        shard: This rank's columns.
        k: Tokens that are taken from a model.
        support: The top k tokens of the student, of the teacher, of both or of either.
        weights: w: the renormalised p, the renormalised q, or uniform over the support.
        variant: The distributions of log p and log q.
    """
    ids, is_in = _support(log_p, log_q, shard, k=k, support=support)
    whole_p, whole_q = gather(log_p, ids, shard), gather(log_q, ids, shard)
    log_p_k, log_q_k = _renormalised(whole_p, is_in), _renormalised(whole_q, is_in)
    p = log_p_k.exp()
    match weights:
        case "student_p":
            w = p
        case "teacher_p":
            w = log_q_k.exp()
        case "none":
            w = is_in.to(p.dtype) / is_in.sum(dim=1, keepdim=True).clamp(min=1)
    if variant == "reference":
        terms = torch.where(is_in, w * (whole_p - whole_q), 0)
        value = terms.sum(dim=1)
        # grad log p of the whole softmax: every token of the vocabulary has a gradient.
        gradient = scatter(terms, ids, shard) - value[:, None] * log_p.exp()
        return Distance(value=value, gradient=gradient)
    terms = torch.where(is_in, w * (log_p_k - log_q_k), 0)
    value = terms.sum(dim=1)
    return Distance(value=value, gradient=scatter(terms - p * value[:, None], ids, shard))


def _support(
    log_p: Tensor, log_q: Tensor, shard: VocabularyShard, *, k: int, support: Support
) -> tuple[Tensor, Tensor]:
    """Token ids [n, k or 2k] and a mask of the support, which has each token at most once."""
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
    """Log-probabilities [n, k] that sum to one over the support; -inf outside it."""
    inside = log_probabilities.masked_fill(~is_in, -torch.inf)
    total = inside.logsumexp(dim=1, keepdim=True)
    # With an empty support the total is -inf, and -inf - (-inf) would be NaN.
    return inside - torch.where(is_in.any(dim=1, keepdim=True), total, 0)
