"""Which layers sit on which pipeline stage, so that every matched pair shares a stage."""

import itertools
import math
from collections.abc import Sequence

from megatron_oprd.errors import UserError
from megatron_oprd.taps.layer_map import LayerPair


def student_stages(
    num_layers: int, pairs: Sequence[LayerPair], num_stages: int, *, num_running: int
) -> tuple[int, ...]:
    """The student's layers on each stage, as even as they go.

    Layers that do not run cost no time and go to the last stage, unless there are more stages
    than other layers. A stage does not end where the map could not be placed (a shallower teacher's
    layer that is matched with the layers on both sides), as long as there are other places.

    Args:
        num_layers: The student's depth.
        pairs: The matched pairs.
        num_stages: Pipeline stages, virtual ones counted one by one.
        num_running: Layers that run in training.

    Raises:
        UserError: There are fewer layers than stages.
    """
    if num_layers < num_stages:
        raise UserError(
            f"{num_stages} pipeline stages (parallel.pipeline_model_parallel_size x virtual "
            f"stages) for the student's {num_layers} layers: every stage needs at least one"
        )
    spread = num_running if num_running >= num_stages else num_layers
    share, more = divmod(spread, num_stages)
    ends = list(itertools.accumulate(share + (stage < more) for stage in range(num_stages - 1)))
    possible = [end for end in range(1, spread) if _separates(end, pairs)]
    if len(possible) >= len(ends):
        ends = _nearest(ends, possible)
    return tuple(end - start for start, end in itertools.pairwise([0, *ends, num_layers]))


def _separates(end: int, pairs: Sequence[LayerPair]) -> bool:
    """Whether the teacher layers of student layers before ``end`` come before all others."""
    before = (pair.teacher for pair in pairs if pair.student < end)
    after = (pair.teacher for pair in pairs if pair.student >= end)
    return max(before, default=-1) < min(after, default=math.inf)


def _nearest(wanted: Sequence[int], possible: Sequence[int]) -> list[int]:
    """For each wanted number the nearest possible one, rising, with enough left for the rest."""
    chosen: list[int] = []
    first = 0
    for number, end in enumerate(wanted):
        last = len(possible) - (len(wanted) - number) + 1
        nearest = min(range(first, last), key=lambda i: abs(possible[i] - end))
        chosen.append(possible[nearest])
        first = nearest + 1
    return chosen


def teacher_stages(
    pairs: Sequence[LayerPair], layers_per_student_stage: Sequence[int], *, depth: int
) -> tuple[int, ...]:
    """The teacher's layers on each stage.

    Teacher layers up to phi(l) live on the stage of student layer l or before it. Where the map
    leaves a choice, the teacher's layers are divided as evenly as it allows.

    Args:
        pairs: The matched pairs, in any order.
        layers_per_student_stage: The student's layers on each stage.
        depth: The teacher's layers that are built, its deepest mapped one or more.

    Raises:
        UserError: No division puts every pair on one stage; the message names the pair.
    """
    stage_of = [stage for stage, count in enumerate(layers_per_student_stage) for _ in range(count)]
    num_stages = len(layers_per_student_stage)
    counts, done = [], 0
    for stage in range(num_stages):
        here_or_before = [p for p in pairs if stage_of[p.student] <= stage]
        after = [p for p in pairs if stage_of[p.student] > stage]
        first_after = min(after, key=lambda p: p.teacher, default=None)
        low = max((p.teacher + 1 for p in here_or_before), default=0)
        high = first_after.teacher if first_after is not None else depth
        if low > high:
            assert first_after is not None
            deepest = max(here_or_before, key=lambda p: p.teacher)
            raise UserError(
                f"taps.layer_map: student layer {first_after.student} (pipeline stage "
                f"{stage_of[first_after.student]}) is matched with teacher layer "
                f"{first_after.teacher}, but student layer {deepest.student} of the earlier stage "
                f"{stage_of[deepest.student]} with teacher layer {deepest.teacher}; matched "
                "layers share a stage, so later student stages need deeper teacher layers"
            )
        even = round((stage + 1) * depth / num_stages)
        end = min(max(even, low, done), high)
        counts.append(end - done)
        done = end
    return tuple(counts)
