"""Fits a bridge: P_T from the teacher's covariance, then P_S to match it; both then stay frozen.

h_S and h_T are rows of one matched pair, z_T = P_T (h_T - mu_T).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oprd.distill.projectors import project_teacher


@dataclass(frozen=True, kw_only=True)
class MomentSums:
    """Sums over n rows (h_S, h_T) of one pair, fp64. They are additive over ranks."""

    count: Tensor  # n, []
    teacher: Tensor  # h_T, [d_T]
    teacher_outer: Tensor  # h_T h_T^T, [d_T, d_T]
    student: Tensor  # h_S, [d_S]
    student_outer: Tensor  # h_S h_S^T, [d_S, d_S]
    cross: Tensor  # h_T h_S^T, [d_T, d_S]

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
        """All sums, for an in-place reduction over ranks."""
        return [
            self.count,
            self.teacher,
            self.teacher_outer,
            self.student,
            self.student_outer,
            self.cross,
        ]


@dataclass(frozen=True, kw_only=True)
class FittedPair:
    """The projectors of one pair, fp32."""

    student: Tensor  # P_S [r, d_S]
    teacher: Tensor  # P_T [r, d_T]
    mean: Tensor  # mu_T [d_T]


def principal_directions(covariance: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of a covariance: [d, d] --> [rank, d].

    Rows are unit vectors, by falling variance.
    """
    _, vectors = torch.linalg.eigh(covariance)  # by rising variance, in columns
    directions = vectors.t().flip(0)[:rank]
    # The sign of an eigenvector is arbitrary: the largest entry is made positive, so that equal
    # covariances give equal directions.
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return directions * largest.sign()


def fit_least_squares(sums: MomentSums, *, rank: int, ridge: float) -> FittedPair:
    """P_T, mu_T and the P_S that minimises the mean of ||P_S h_S - z_T||^2 plus a ridge.

    P_S = E[z_T h_S^T] (E[h_S h_S^T] + lambda I)^-1, without mean or bias on the student's side.
    lambda is ``ridge`` (> 0) times the mean diagonal entry of E[h_S h_S^T]. Each row of P_S depends
    only on its own row of P_T, so the leading rows are the fit of a lower rank. ``sums`` are over
    at least 2 rows.
    """
    count = sums.count
    mean = sums.teacher / count
    # The mean is far larger than the deviations, so this difference loses digits: hence fp64 sums.
    covariance = (sums.teacher_outer - count * torch.outer(mean, mean)) / (count - 1)
    directions = principal_directions(covariance, rank)
    student_outer = sums.student_outer / count
    # E[(h_T - mu_T) h_S^T]
    cross = (sums.cross - torch.outer(mean, sums.student)) / count
    # Also makes the matrix positive definite, as Cholesky needs it.
    student_outer.diagonal().add_(ridge * student_outer.diagonal().mean())
    factor = torch.linalg.cholesky(student_outer)
    # Solved for the transpose, because the matrix is on the right of P_S.
    student = torch.cholesky_solve((directions @ cross).t(), factor).t()
    return FittedPair(student=student.float(), teacher=directions.float(), mean=mean.float())


def fit_gradient(
    student_rows: Tensor,
    teacher_rows: Tensor,
    *,
    rank: int,
    epochs: int,
    lr: float,
    batch_rows: int,
    seed: int,
) -> FittedPair:
    """The paper's method: P_T from the covariance, then P_S by AdamW on ||P_S h_S - z_T||^2.

    Args:
        student_rows: h_S [n, d_S], any floating dtype.
        teacher_rows: h_T [n, d_T], any floating dtype.
        rank: r.
        epochs: Passes over the rows.
        lr: AdamW's learning rate, without weight decay.
        batch_rows: Rows of an update.
        seed: For the initial P_S (`random_student`) and the order of the rows.
    """
    # The covariance is computed in fp64, as from `MomentSums`.
    rows = teacher_rows.double()
    mean = rows.mean(dim=0)
    centred = rows - mean
    directions = principal_directions(centred.t() @ centred / (len(rows) - 1), rank)
    teacher, mean = directions.float(), mean.float()
    device = student_rows.device
    targets = project_teacher(teacher_rows, teacher, mean)
    start = random_student(rank, student_rows.shape[1], seed=seed).to(device)
    weight = torch.nn.Parameter(start)
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=0.0)
    # On the CPU: the same order on every device.
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(rows), generator=order).to(device).split(batch_rows):
            states = student_rows[batch].float() @ weight.t()
            loss = (states - targets[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return FittedPair(student=weight.detach(), teacher=teacher, mean=mean)


def random_student(rank: int, width: int, *, seed: int) -> Tensor:
    """P_S before any fit, [rank, width], fp32, on the CPU: uniform in +-1/sqrt(width)."""
    # On the CPU, so that the values are the same for every device.
    generator = torch.Generator().manual_seed(seed)
    # As torch initialises a linear layer.
    return (2 * torch.rand(rank, width, generator=generator) - 1) / math.sqrt(width)
