"""OPRD-Bridge: hidden states of two models in one r-dimensional space.

A frozen projector pair maps h_S to P_S h_S and h_T to P_T (h_T - mu_T). The loss of a position is
`compare` of the two with ``normalize="l2"``: the squared distance of the unit vectors divided by r,
as in the reference implementation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Projectors:
    """The frozen fp32 projectors of some mapped layers, all of the same rank r."""

    student: Mapping[int, Tensor]  # P_S [r, d_S] by student layer
    teacher: Mapping[int, Tensor]  # P_T [r, d_T] by teacher layer
    mean: Mapping[int, Tensor]  # mu_T [d_T] by teacher layer

    def project_student(self, layer: int, hidden: Tensor) -> Tensor:
        """P_S h_S: [..., d_S] --> [..., r], in the projector's dtype."""
        return project_student(hidden, self.student[layer])

    def student_gradient(self, layer: int, gradient: Tensor) -> Tensor:
        """Maps the gradient of P_S h_S to that of h_S: [..., r] --> [..., d_S]."""
        return gradient @ self.student[layer]

    def project_teacher(self, layer: int, hidden: Tensor) -> Tensor:
        """P_T (h_T - mu_T): [..., d_T] --> [..., r], in the projector's dtype."""
        return project_teacher(hidden, self.teacher[layer], self.mean[layer])


def project_student(hidden: Tensor, weight: Tensor) -> Tensor:
    """P_S h_S: [..., d_S] --> [..., r] in the dtype of ``weight`` [r, d_S]."""
    return hidden.to(weight.dtype) @ weight.t()


def project_teacher(hidden: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
    """P_T (h_T - mu_T): [..., d_T] --> [..., r] in the dtype of ``weight`` [r, d_T]."""
    # Subtracted first: the mean is far larger than the rest, and would cost precision in the
    # product.
    return (hidden.to(weight.dtype) - mean) @ weight.t()
