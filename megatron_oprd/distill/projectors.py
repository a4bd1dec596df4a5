"""OPRD-Bridge: hidden states of two models in one r-dimensional space.

A frozen projector pair takes h_S to P_S h_S and h_T to P_T (h_T - mu_T). The loss of a position is
the distance of the two as unit vectors, `compare` with ``normalize="l2"``: the squared distance
divided by r, as in the reference implementation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Projectors:
    """The frozen projectors of some mapped layers, all of one rank r; fp32.

    Attributes:
        student: P_S [r, d_S] by student layer.
        teacher: P_T [r, d_T] by teacher layer.
        mean: mu_T [d_T] by teacher layer.
    """

    student: Mapping[int, Tensor]
    teacher: Mapping[int, Tensor]
    mean: Mapping[int, Tensor]

    def project_student(self, layer: int, hidden: Tensor) -> Tensor:
        """P_S h_S: [..., d_S] --> [..., r], in the projector's dtype."""
        return project_student(hidden, self.student[layer])

    def student_gradient(self, layer: int, gradient: Tensor) -> Tensor:
        """What a gradient with respect to P_S h_S is to h_S: [..., r] --> [..., d_S]."""
        return gradient @ self.student[layer]

    def project_teacher(self, layer: int, hidden: Tensor) -> Tensor:
        """P_T (h_T - mu_T): [..., d_T] --> [..., r], in the projector's dtype."""
        return project_teacher(hidden, self.teacher[layer], self.mean[layer])


def project_student(hidden: Tensor, weight: Tensor) -> Tensor:
    """P_S h_S.

    Args:
        hidden: Hidden states [..., d_S], any floating dtype.
        weight: P_S [r, d_S].

    Returns:
        [..., r] in ``weight``'s dtype.
    """
    return hidden.to(weight.dtype) @ weight.t()


def project_teacher(hidden: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
    """P_T (h_T - mu_T). The mean goes first, since it is far larger than what is left.

    Args:
        hidden: Hidden states [..., d_T], any floating dtype.
        weight: P_T [r, d_T].
        mean: mu_T [d_T].

    Returns:
        [..., r] in ``weight``'s dtype.
    """
    return (hidden.to(weight.dtype) - mean) @ weight.t()
