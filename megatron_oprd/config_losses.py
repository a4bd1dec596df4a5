"""The losses' settings."""

from dataclasses import dataclass
from typing import Literal

Positions = Literal["all", "last", "last_k", "first_k"]
Normalize = Literal["none", "l2"]
Aggregation = Literal["token_mean", "sequence_mean"]
OutputLoss = Literal["none", "sampled_token", "top_k", "reverse_kl", "forward_kl", "jsd"]
Support = Literal["only_stu", "only_tch", "intersection", "union"]
SupportWeights = Literal["student_p", "teacher_p", "none"]


@dataclass(kw_only=True)
class LossConfig:
    """The loss on hidden states. It and the output-space loss, if there is one, are added up.

    Attributes:
        normalize: none compares hidden states as they are; l2 makes them unit vectors first (the
            loss is then about 1/d as large and wants a coefficient of 100 to 1000).
        coefficient: Factor on the loss (the paper's mu). 0 leaves it out of the gradient; the
            layers' losses and cosines are still measured.
        layer_weights: Factor on the loss of each tapped layer; None is 1 for each. The loss is the
            sum of the layers' weighted losses, divided by the number of tapped layers.
        aggregation: token_mean averages over all supervised tokens of the global batch;
            sequence_mean over each response's tokens, then over responses (eq. 6). Of both losses.
    """

    normalize: Normalize = "none"
    coefficient: float = 1.0
    layer_weights: list[float] | None = None
    aggregation: Aggregation = "token_mean"


@dataclass(kw_only=True)
class OutputLossConfig:
    """The loss on next-token distributions (OPD): p the student's, q the teacher's.

    Attributes:
        kind: none; sampled_token: policy gradient with the detached log q - log p of the sampled
            token as its advantage; top_k: reverse KL of both distributions renormalised on a few
            tokens; reverse_kl, KL(p || q), forward_kl, KL(q || p), and jsd, the generalised
            Jensen-Shannon divergence, over the whole vocabulary.
        coefficient: Factor on the loss.
        k: For top_k: how many tokens of a model are taken.
        support: For top_k: the student's k most likely tokens, the teacher's, those in both, or
            those in either.
        support_weights: For top_k: what each token's log-ratio counts for: the renormalised p (the
            exact KL), the renormalised q, or the same for all.
        beta: For jsd: the teacher's share of the mixture m = beta * q + (1 - beta) * p, and the
            weight of KL(q || m) beside that of KL(p || m), 1 - beta.
        positions: Response tokens whose distributions are compared, as in ``taps.positions``.
        positions_k: For last_k and first_k: how many tokens of each response.
        student_temperature: The student's logits are divided by this.
        teacher_temperature: The teacher's are by this.
        chunk_tokens: Positions whose logits exist at a time.
    """

    kind: OutputLoss = "none"
    coefficient: float = 1.0
    k: int = 16
    support: Support = "only_stu"
    support_weights: SupportWeights = "student_p"
    beta: float = 0.5
    positions: Positions = "all"
    positions_k: int | None = None
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    chunk_tokens: int = 512
