"""The layer map: supervised student layers, their teacher layers, and the pipeline stage of each.

Layers are counted from 0: layer l is the l-th transformer block. Both layers of a pair are on the
same pipeline stage, so that no hidden state crosses a stage boundary.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megatron_oprd.config.schema import LayerSet
from megatron_oprd.errors import UserError


@dataclass(frozen=True)
class LayerPair:
    """A student layer and the teacher layer it is matched with, both counted from 0."""

    student: int
    teacher: int


def proportional_layer_map(num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """The teacher layer for every student layer by depth (the paper's eq. 11), counted from 0.

    With layers counted from 1, phi(l) = round((l-1)/(L_S-1) * (L_T-1)) + 1. A student of one layer
    is matched with the teacher's last. The map never decreases. Raises a ValueError for a model
    without layers.
    """
    if num_student_layers < 1 or num_teacher_layers < 1:
        raise ValueError(
            f"a model has at least one layer; got num_student_layers={num_student_layers}, "
            f"num_teacher_layers={num_teacher_layers}"
        )
    last_student, last_teacher = num_student_layers - 1, num_teacher_layers - 1
    if last_student == 0:
        return [last_teacher]
    # Exact, because a float quotient could miss a half. Halves round to even, as in the reference
    # code.
    return [
        round(Fraction(layer * last_teacher, last_student)) for layer in range(num_student_layers)
    ]


def select_layers(
    layers: LayerSet | Sequence[int], num_layers: int, *, n: int | None = None
) -> list[int]:
    """The student layers that ``taps.layers`` selects, from 0, in rising order.

    Args:
        layers: ``all``, ``last``, ``last_n``, ``even`` (0, 2, 4, ...), ``odd`` (1, 3, 5, ...),
            ``none``, or a rising list of layers.
        num_layers: The student's number of layers.
        n: The number of layers of ``last_n``.

    Raises:
        UserError: A list that is out of range, ``odd`` with a model of one layer, or an ``n`` above
            ``num_layers``.
    """
    if isinstance(layers, str):
        chosen = {
            "all": range(num_layers),
            "last": range(num_layers - 1, num_layers),
            "last_n": range(num_layers - (n or 0), num_layers),
            "even": range(0, num_layers, 2),
            "odd": range(1, num_layers, 2),
            "none": range(0),
        }.get(layers)
        assert chosen is not None, f"unknown layer set {layers!r}"
        if n is not None and n > num_layers:
            raise UserError(
                f"taps.n = {n} is more than the student's {num_layers} layers; give at most that"
            )
        if not chosen and layers != "none":
            raise UserError(
                f"taps.layers = {layers} selects none of the student's {num_layers} layers; give "
                "a list of layers, or all"
            )
        return list(chosen)

    listed = list(layers)
    _check_range("taps.layers", listed, num_layers, "student")
    return listed


def layer_pairs(
    layers: LayerSet | Sequence[int],
    layer_map: Literal["proportional"] | Sequence[int],
    *,
    num_student_layers: int,
    num_teacher_layers: int,
    n: int | None = None,
) -> list[LayerPair]:
    """The layers that are compared: a pair for each selected student layer, in rising order.

    ``layers`` and ``n`` go to `select_layers`. ``layer_map`` is ``proportional`` or a list with a
    teacher layer, from 0, for each selected student layer, in any order. Raises a UserError for a
    mistake in either.
    """
    student_layers = select_layers(layers, num_student_layers, n=n)
    if isinstance(layer_map, str):
        assert layer_map == "proportional"
        by_depth = proportional_layer_map(num_student_layers, num_teacher_layers)
        teacher_layers = [by_depth[layer] for layer in student_layers]
    else:
        teacher_layers = list(layer_map)
        if len(teacher_layers) != len(student_layers):
            raise UserError(
                f"taps.layer_map has {len(teacher_layers)} teacher layers {teacher_layers}; it "
                f"must have {len(student_layers)}, one for each student layer {student_layers} "
                "that taps.layers selects"
            )
        _check_range("taps.layer_map", teacher_layers, num_teacher_layers, "teacher")
    return [LayerPair(s, t) for s, t in zip(student_layers, teacher_layers, strict=True)]


def _check_range(setting: str, listed: list[int], num_layers: int, whose: str) -> None:
    outside = [layer for layer in listed if not 0 <= layer < num_layers]
    if outside:
        raise UserError(
            f"{setting} has {', '.join(map(str, outside))}; the {whose}'s layers are 0 to "
            f"{num_layers - 1}"
        )


def student_stages(
    num_layers: int, pairs: Sequence[LayerPair], num_stages: int, *, num_running: int
) -> tuple[int, ...]:
    """The number of student layers on each pipeline stage (virtual stages included), balanced.

    Layers that are not run (training stops after ``num_running``) cost no time and go to the last
    stage, unless there are more stages than running layers. Raises a UserError if there are fewer
    layers than stages.
    """
    if num_layers < num_stages:
        raise UserError(
            f"parallel.pipeline_model_parallel_size x virtual stages makes {num_stages} pipeline "
            f"stages, but the student has only {num_layers} layers; every stage needs at least one"
        )
    spread = num_running if num_running >= num_stages else num_layers
    share, more = divmod(spread, num_stages)
    ends = list(itertools.accumulate(share + (stage < more) for stage in range(num_stages - 1)))
    # A shallower teacher's layer can be matched with several student layers. A boundary between
    # them would need it on two stages, so avoid these boundaries while there are enough others.
    possible = [end for end in range(1, spread) if _separates(end, pairs)]
    if len(possible) >= len(ends):
        ends = _nearest(ends, possible)
    return tuple(end - start for start, end in itertools.pairwise([0, *ends, num_layers]))


def _separates(end: int, pairs: Sequence[LayerPair]) -> bool:
    """Whether student layers before ``end`` have shallower teacher layers than all the others."""
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
    """The number of teacher layers on each stage, balanced as far as the pairs allow.

    ``depth`` is the number of teacher layers that are built, at least up to the deepest mapped
    layer. Raises a UserError if the layers of a pair cannot be on the same stage, and names the
    pair.
    """
    stage_of = [stage for stage, count in enumerate(layers_per_student_stage) for _ in range(count)]
    num_stages = len(layers_per_student_stage)
    counts, done = [], 0
    for stage in range(num_stages):
        here_or_before = [p for p in pairs if stage_of[p.student] <= stage]
        after = [p for p in pairs if stage_of[p.student] > stage]
        first_after = min(after, key=lambda p: p.teacher, default=None)
        # The stage has to end after the teacher layers matched so far (low) and before the first
        # one that a later stage needs (high).
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
