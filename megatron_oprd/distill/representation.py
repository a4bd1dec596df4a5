"""OPRD's loss of one layer: the distance between the student's and the teacher's hidden states.

For position n with hidden states h_S and h_T of width d the distance is

    (1/d) * ||h_S - h_T||^2                      normalize = none, the paper's main results
    (1/d) * ||h_S/|h_S| - h_T/|h_T|||^2          normalize = l2, the reference code

`megatron_oprd.distill.positions` has the weight of each position, and `RunLayout.pair_coefficients`
the factor of each layer; the taps multiply and add up. `compare` is what training runs.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from megatron_oprd.config.schema import Normalize

_SMALLEST_NORM = 1e-12  # a shorter vector is not made a unit vector, as in torch's normalize


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of n pairs of vectors; fp32, or fp64 for fp64 vectors.

    Attributes:
        distance: The loss of each pair, [n].
        cosine: The cosine of the angle between the vectors of each pair, [n].
        gradient: The gradient of each distance with respect to its student vector, [n, d].
    """

    distance: Tensor
    cosine: Tensor
    gradient: Tensor


@torch.no_grad()
def compare(student: Tensor, teacher: Tensor, *, normalize: Normalize) -> Comparison:
    """Computes distance, gradient and cosine of pairs of vectors in few passes over memory.

    The gradient is in closed form: the tap adds it in the backward pass, and no graph is kept.

    Args:
        student: Hidden states [n, d], any floating dtype.
        teacher: Hidden states [n, d], any floating dtype.
        normalize: Which of the two distances.

    Raises:
        ValueError: Unknown ``normalize``, or the shapes differ.
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
    # A change along the vector changes its length only, which does not count.
    along = torch.linalg.vecdot(unit, difference)
    gradient = difference.addcmul_(unit, along[:, None], value=-1).mul_(2 / width).div_(of_student)
    return Comparison(distance=distance, cosine=cosine, gradient=gradient)


@torch.no_grad()
def token_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine of each pair of vectors, [..., d] --> [...]; 0 where a vector is zero.

    Raises:
        ValueError: The shapes differ.
    """
    student, teacher = _comparable(student, teacher)
    return _cosine(student, teacher, _norm(student), _norm(teacher))


def _cosine(student: Tensor, teacher: Tensor, of_student: Tensor, of_teacher: Tensor) -> Tensor:
    return torch.linalg.vecdot(student, teacher) / (of_student * of_teacher).squeeze(-1)


def _norm(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=_SMALLEST_NORM)


def _comparable(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that the comparison is computed in."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape"
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)
