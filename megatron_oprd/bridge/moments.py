"""Streamed sums over the rows of one matched pair, from which a bridge can be fitted."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MomentSums:
    """Sums over n rows (h_S, h_T) of one pair, fp64. They add up over ranks.

    Attributes:
        count: n, [].
        teacher: Sum of h_T, [d_T].
        teacher_outer: Sum of h_T h_T^T, [d_T, d_T].
        student: Sum of h_S, [d_S].
        student_outer: Sum of h_S h_S^T, [d_S, d_S].
        cross: Sum of h_T h_S^T, [d_T, d_S].
    """

    count: Tensor
    teacher: Tensor
    teacher_outer: Tensor
    student: Tensor
    student_outer: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, student_width: int, teacher_width: int, device: torch.device) -> "MomentSums":
        """Sums over no rows."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            count=zeros(),
            teacher=zeros(teacher_width),
            teacher_outer=zeros(teacher_width, teacher_width),
            student=zeros(student_width),
            student_outer=zeros(student_width, student_width),
            cross=zeros(teacher_width, student_width),
        )

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Adds rows h_S [n, d_S] and h_T [n, d_T], of any floating dtype."""
        h_s, h_t = student.double(), teacher.double()
        self.count.add_(len(h_s))
        self.teacher.add_(h_t.sum(dim=0))
        self.teacher_outer.addmm_(h_t.t(), h_t)
        self.student.add_(h_s.sum(dim=0))
        self.student_outer.addmm_(h_s.t(), h_s)
        self.cross.addmm_(h_t.t(), h_s)

    def tensors(self) -> list[Tensor]:
        """All sums, to be added up over ranks in place."""
        return [
            self.count,
            self.teacher,
            self.teacher_outer,
            self.student,
            self.student_outer,
            self.cross,
        ]
