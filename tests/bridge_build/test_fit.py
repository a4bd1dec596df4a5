"""Fits on rows that are known, against torch's own solvers."""

import pytest
import torch
from torch import Tensor

from megatron_oprd.bridge_build.fit import (
    FittedPair,
    MomentSums,
    fit_gradient,
    fit_least_squares,
    principal_directions,
)
from megatron_oprd.distill.projectors import project_student, project_teacher
from megatron_oprd.distill.representation import token_cosine
from tests.helpers.closeness import assert_close_relative

D_S, D_T = 12, 20


def related_rows(
    n: int, *, rank: int, noise: float, weakest: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """h_T is a linear image of h_S of known rank, off centre, plus noise."""
    fixed = torch.Generator().manual_seed(100)
    left = torch.linalg.qr(torch.randn(D_T, rank, generator=fixed)).Q
    right = torch.linalg.qr(torch.randn(D_S, rank, generator=fixed)).Q
    strengths = torch.linspace(4, weakest, rank)
    centre = 3 * torch.randn(D_T, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, D_S, generator=generator)
    clean = student @ right * strengths @ left.t() + centre
    return student, clean + noise * torch.randn(n, D_T, generator=generator)


def sums_of(student: Tensor, teacher: Tensor, *, parts: int = 1) -> MomentSums:
    sums = MomentSums.zeros(D_S, D_T, torch.device("cpu"))
    for s, t in zip(student.chunk(parts), teacher.chunk(parts), strict=True):
        sums.add(s, t)
    return sums


def cosines(fitted: FittedPair, student: Tensor, teacher: Tensor) -> list[float]:
    """Mean cosine for every rank."""
    states = project_student(student, fitted.student)
    targets = project_teacher(teacher, fitted.teacher, fitted.mean)
    return [
        float(token_cosine(states[:, :rank], targets[:, :rank]).mean())
        for rank in range(1, len(fitted.student) + 1)
    ]


def test_streamed_sums_are_those_of_all_rows() -> None:
    student, teacher = related_rows(101, rank=4, noise=0.1)
    sums = sums_of(student.bfloat16(), teacher.bfloat16(), parts=7)
    h_s, h_t = student.bfloat16().double(), teacher.bfloat16().double()
    expected = [torch.tensor(101.0), h_t.sum(0), h_t.t() @ h_t]
    expected += [h_s.sum(0), h_s.t() @ h_s, h_t.t() @ h_s]
    for found, wanted in zip(sums.tensors(), expected, strict=True):
        assert_close_relative(found, wanted, 1e-13)


def test_least_squares_is_torchs_on_the_rows() -> None:
    student, teacher = (x.double() for x in related_rows(300, rank=6, noise=0.3))
    student = student + 0.5  # the student's mean is not taken off
    fitted = fit_least_squares(sums_of(student, teacher, parts=3), rank=5, ridge=1e-12)

    mean = teacher.mean(0)
    assert_close_relative(fitted.mean, mean, 1e-6)
    _, values, directions = torch.linalg.svd(teacher - mean, full_matrices=False)
    assert float(values[4] / values[5]) > 1.05, "the directions would not be unique"
    signs = (fitted.teacher.double() * directions[:5]).sum(1).sign()
    expected = directions[:5] * signs[:, None]
    assert_close_relative(fitted.teacher, expected, 1e-5)
    assert bool((fitted.teacher.gather(1, fitted.teacher.abs().argmax(1, keepdim=True)) > 0).all())

    solution = torch.linalg.lstsq(student, (teacher - mean) @ expected.t()).solution
    assert_close_relative(fitted.student, solution.t(), 1e-5)


def test_ridge_is_relative_to_the_students_second_moments() -> None:
    student, teacher = (x.double() for x in related_rows(50, rank=3, noise=0.3))
    found = fit_least_squares(sums_of(student, teacher), rank=3, ridge=0.1)
    size = 0.1 * student.square().sum() / D_S
    padded = torch.cat([student, size.sqrt() * torch.eye(D_S, dtype=torch.float64)])
    targets = (teacher - teacher.mean(0)) @ found.teacher.double().t()
    solution = torch.linalg.lstsq(padded, torch.cat([targets, targets.new_zeros(D_S, 3)])).solution
    assert_close_relative(found.student, solution.t(), 1e-5)


def test_leading_rows_are_the_fit_of_a_lower_rank() -> None:
    sums = sums_of(*related_rows(200, rank=6, noise=0.2))
    high, low = (fit_least_squares(sums, rank=rank, ridge=1e-6) for rank in (6, 2))
    assert_close_relative(high.student[:2], low.student, 1e-6)
    assert_close_relative(high.teacher[:2], low.teacher, 1e-6)


def test_directions_of_a_covariance_are_ordered_by_variance() -> None:
    variances = torch.tensor([1.0, 9.0, 4.0], dtype=torch.float64)
    found = principal_directions(torch.diag(variances), 2)
    assert_close_relative(found, [[0.0, 1, 0], [0, 0, 1]], 1e-12)


@pytest.mark.parametrize("method", ["least_squares", "gradient"])
def test_cosine_peaks_at_the_true_rank(method: str) -> None:
    """Teacher = linear image of rank 5 of the student + noise, measured on other rows."""
    student, teacher = related_rows(4000, rank=5, noise=0.5, weakest=3.9)
    if method == "least_squares":
        fitted = fit_least_squares(sums_of(student, teacher), rank=9, ridge=1e-6)
    else:
        fitted = fit_gradient(student, teacher, rank=9, epochs=20, lr=1e-2, batch_rows=256, seed=0)
    found = cosines(fitted, *related_rows(2000, rank=5, noise=0.5, weakest=3.9, seed=1))
    assert found[:5] == sorted(found[:5])
    assert found[4:] == sorted(found[4:], reverse=True)
    assert found[4] > 0.97
    assert found[8] < found[4] - 0.005


def test_least_squares_is_at_least_as_good_as_gradient_descent() -> None:
    student, teacher = related_rows(4000, rank=8, noise=0.5)
    solved = fit_least_squares(sums_of(student, teacher), rank=8, ridge=1e-6)
    descended = fit_gradient(student, teacher, rank=8, epochs=20, lr=1e-3, batch_rows=256, seed=0)
    assert_close_relative(solved.teacher, descended.teacher, 1e-4)
    others = related_rows(2000, rank=8, noise=0.5, seed=1)
    assert cosines(solved, *others)[7] >= cosines(descended, *others)[7] - 1e-4
