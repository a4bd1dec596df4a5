"""The coefficient of a loss at each step, by its schedule."""

import itertools
import math
from collections.abc import Sequence

from megatron_oprd.config.schema import Interpolation, LossConfig, OutputLossConfig


def coefficient_at(loss: LossConfig | OutputLossConfig, step: int) -> float:
    """The factor on a loss at a ``step`` (from 0) of the run."""
    return loss.coefficient * schedule_factor(
        loss.coefficient_points, loss.coefficient_schedule, step
    )


def schedule_factor(
    points: Sequence[Sequence[float]], interpolation: Interpolation, step: int
) -> float:
    """The factor of a schedule at a step.

    Args:
        points: Pairs (step, factor) by rising step; none is a factor of 1 throughout.
        interpolation: The factors between two points, see ``loss.coefficient_schedule``.
        step: The step, from 0.
    """
    if not points:
        return 1.0
    if step <= points[0][0]:
        return points[0][1]
    for (start, before), (end, after) in itertools.pairwise(points):
        if step >= end:
            continue
        if interpolation == "piecewise":
            return before
        share = (step - start) / (end - start)
        if interpolation == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return before + (after - before) * share
    return points[-1][1]
