"""OPRD-Vanilla: the distance between a student's and a teacher's hidden states.

Shape suffixes are not needed here: every function takes hidden states [..., d] and gives one value
for each vector, [...], or their mean over the selected ones.
"""

from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_oprd.config.schema import Normalize

_SMALLEST_NORM = 1e-12  # a shorter vector is not made a unit vector, as in torch's normalize


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
    _check_normalize(normalize)
    student, teacher = _comparable(student, teacher)
    if normalize == "l2":
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return (student - teacher).square().mean(dim=-1)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a tap needs of n pairs of vectors; fp32, or fp64 for fp64 vectors.

    Attributes:
        distance: `token_mse`, [n].
        cosine: `token_cosine`, [n].
        gradient: Of each distance with respect to its student vector, [n, d].
    """

    distance: Tensor
    cosine: Tensor
    gradient: Tensor


@torch.no_grad()
def compare(student: Tensor, teacher: Tensor, *, normalize: Normalize) -> Comparison:
    """`token_mse` with its gradient in closed form, and `token_cosine`, in few passes over memory.

    Args:
        student: Hidden states [n, d], any floating dtype.
        teacher: Likewise.
        normalize: See `token_mse`.

    Raises:
        ValueError: Unknown ``normalize``, or the shapes differ.
    """
    _check_normalize(normalize)
    student, teacher = _comparable(student, teacher)
    width = student.shape[-1]
    of_student, of_teacher = (
        torch.linalg.vector_norm(one, dim=-1, keepdim=True).clamp(min=_SMALLEST_NORM)
        for one in (student, teacher)
    )
    dot = torch.linalg.vecdot(student, teacher)
    cosine = dot / (of_student * of_teacher).squeeze(-1)
    if normalize == "none":
        difference = student - teacher
        distance = torch.linalg.vecdot(difference, difference) / width
        return Comparison(distance=distance, cosine=cosine, gradient=difference.mul_(2 / width))
    unit = student / of_student
    difference = unit - teacher / of_teacher
    distance = torch.linalg.vecdot(difference, difference) / width
    # A change along the vector changes its length only.
    along = torch.linalg.vecdot(unit, difference)
    gradient = difference.addcmul_(unit, along[:, None], value=-1).mul_(2 / width).div_(of_student)
    return Comparison(distance=distance, cosine=cosine, gradient=gradient)


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


def _check_normalize(normalize: str) -> None:
    if normalize not in get_args(Normalize):
        allowed = ", ".join(get_args(Normalize))
        raise ValueError(f"normalize is {normalize!r}; it must be one of: {allowed}")


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
