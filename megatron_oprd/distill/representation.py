"""OPRD's loss of one layer: the distance between the student's and the teacher's hidden states.

For position n with hidden states h_S and h_T of width d the distance is

    (1/d) * ||h_S - h_T||^2                      normalize = none, the paper's main results
    (1/d) * ||h_S/|h_S| - h_T/|h_T|||^2          normalize = l2, the reference code

The taps multiply it by the weight of the position (`megatron_oprd.distill.positions`) and the
coefficient of the layer (`RunLayout.pair_coefficients`) and sum up.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from megatron_oprd.config.schema import Normalize

_SMALLEST_NORM = 1e-12  # a shorter vector is not made a unit vector, as in torch's normalize


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of n pairs of vectors; fp32, or fp64 for fp64 vectors."""

    distance: Tensor  # [n], the loss of each pair
    cosine: Tensor  # [n]
    gradient: Tensor  # [n, d], of each distance with respect to its student vector


@torch.no_grad()
def compare(student: Tensor, teacher: Tensor, *, normalize: Normalize) -> Comparison:
    """Distance, cosine and gradient of n pairs of hidden states [n, d], any floating dtype.

    The gradient is in closed form, so no graph is kept; the tap adds it in the backward pass.
    Raises a ValueError for an unknown ``normalize`` or different shapes.
    """
    if normalize not in get_args(Normalize):
        allowed = ", ".join(get_args(Normalize))
        raise ValueError(f"normalize is {normalize!r}; it must be one of: {allowed}")
    student, teacher = _comparable(student, teacher)
    width = student.shape[-1]
    of_student, of_teacher = _norm(student), _norm(teacher)
    cosine = _cosine(student, teacher, of_student, of_teacher)
    if normalize == "none":
        difference = student - teacher
        distance = torch.linalg.vecdot(difference, difference) / width
        return Comparison(distance=distance, cosine=cosine, gradient=difference.mul_(2 / width))
    unit = student / of_student
    difference = unit - teacher / of_teacher
    distance = torch.linalg.vecdot(difference, difference) / width
    # Project out the component along the vector: it changes only the length, which l2 ignores.
    along = torch.linalg.vecdot(unit, difference)
    gradient = difference.addcmul_(unit, along[:, None], value=-1).mul_(2 / width).div_(of_student)
    return Comparison(distance=distance, cosine=cosine, gradient=gradient)


@torch.no_grad()
def token_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine of each pair of vectors of the same shape, [..., d] --> [...]; 0 for a zero vector."""
    student, teacher = _comparable(student, teacher)
    return _cosine(student, teacher, _norm(student), _norm(teacher))


def _cosine(student: Tensor, teacher: Tensor, of_student: Tensor, of_teacher: Tensor) -> Tensor:
    return torch.linalg.vecdot(student, teacher) / (of_student * of_teacher).squeeze(-1)


def _norm(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=_SMALLEST_NORM)


def _comparable(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape"
        )
    # At least fp32: bf16 has only 8 significant bits.
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)
