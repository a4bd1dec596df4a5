"""OPRD-Vanilla: the distance between a student's and a teacher's hidden states.

Shape suffixes are not needed here: every function takes hidden states [..., d] and gives one value
for each vector, [...], or their mean over the selected ones.
"""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_oprd.config import Normalize


def token_mse(student: Tensor, teacher: Tensor, *, normalize: Normalize) -> Tensor:
    """Squared distance of each pair of vectors, divided by their width: (1/d) * ||h_S - h_T||^2.

    Args:
        student: Hidden states [..., d], any floating dtype; the gradient goes here.
        teacher: Hidden states [..., d]; detached.
        normalize: ``none`` takes the vectors as they are (the paper's main results); ``l2`` divides
            each by its Euclidean norm first (the reference code) and still divides by d.

    Returns:
        One value a vector, [...]: fp32, or fp64 when an input is fp64.

    Raises:
        ValueError: Unknown ``normalize``, or the shapes differ.
    """
    if normalize not in get_args(Normalize):
        allowed = ", ".join(get_args(Normalize))
        raise ValueError(f"normalize is {normalize!r}; it must be one of: {allowed}")
    student, teacher = _comparable(student, teacher)
    if normalize == "l2":
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return (student - teacher).square().mean(dim=-1)


def token_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine of the angle between each pair of vectors (0 where a vector is zero).

    Args:
        student: Hidden states [..., d], any floating dtype; the gradient goes here.
        teacher: Hidden states [..., d]; detached.

    Returns:
        One value a vector, [...]: fp32, or fp64 when an input is fp64.

    Raises:
        ValueError: The shapes differ.
    """
    student, teacher = _comparable(student, teacher)
    return (F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(dim=-1)


def masked_mse(student: Tensor, teacher: Tensor, mask: Tensor, *, normalize: Normalize) -> Tensor:
    """Mean of `token_mse` over the selected vectors: OPRD's loss of one layer.

    The mean is over all selected vectors together, not first within a sequence. What is not
    selected takes no part: not even a NaN there reaches the value or the gradient.

    Args:
        student: Hidden states [..., d], any floating dtype; the gradient goes here.
        teacher: Hidden states [..., d]; detached.
        mask: [...], zero where a vector is left out; any dtype.
        normalize: See `token_mse`.

    Returns:
        A scalar, fp32 or fp64; 0 when nothing is selected.

    Raises:
        ValueError: Unknown ``normalize``, or the shapes do not fit.
    """
    student, teacher = _selected(student, teacher, mask)
    return _mean(token_mse(student, teacher, normalize=normalize))


def masked_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean of `token_cosine` over the selected vectors.

    Args:
        student: Hidden states [..., d], any floating dtype; the gradient goes here.
        teacher: Hidden states [..., d]; detached.
        mask: [...], zero where a vector is left out; any dtype.

    Returns:
        A scalar, fp32 or fp64; 0 when nothing is selected.

    Raises:
        ValueError: The shapes do not fit.
    """
    student, teacher = _selected(student, teacher, mask)
    return _mean(token_cosine(student, teacher))


def _comparable(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype the comparison is computed in, the teacher detached."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape"
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _selected(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The selected vectors of both: [..., d] --> [n, d]."""
    for name, hidden in (("student", student), ("teacher", teacher)):
        if hidden.shape[:-1] != mask.shape:
            raise ValueError(
                f"mask {tuple(mask.shape)} must have the shape of {name} {tuple(hidden.shape)}"
                " without its last dimension"
            )
    chosen = mask != 0
    return student[chosen], teacher[chosen]


def _mean(values: Tensor) -> Tensor:
    """Mean of [n], 0 for n = 0 (and then still part of the graph)."""
    return values.sum() / max(values.numel(), 1)
