import itertools
import random
from collections.abc import Sequence

import pytest

from megatron_oprd.distill.layer_map import LayerPair, layer_pairs, student_stages, teacher_stages
from megatron_oprd.errors import UserError


def pairs_of(*pairs: tuple[int, int]) -> list[LayerPair]:
    return [LayerPair(student, teacher) for student, teacher in pairs]


def depth_of(pairs: Sequence[LayerPair]) -> int:
    return max(pair.teacher for pair in pairs) + 1


def stages_of(counts: tuple[int, ...]) -> list[int]:
    return [stage for stage, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize(
    ("num_layers", "teachers", "num_stages", "expected"),
    [
        (4, range(4), 1, (4,)),
        (4, range(4), 4, (1, 1, 1, 1)),
        (7, range(7), 2, (4, 3)),
        (24, range(24), 5, (5, 5, 5, 5, 4)),
        # Six of ten layers run: three on each stage, and the idle ones behind them.
        (10, range(6), 2, (3, 7)),
        (10, range(7), 3, (3, 2, 5)),
        # Fewer running layers than stages.
        (10, range(3), 4, (3, 3, 2, 2)),
        # A stage cannot end between student layers 2 and 3, which have one teacher layer.
        (5, (0, 1, 2, 2, 3), 2, (2, 3)),
        (6, (0, 1, 2, 2, 3, 3), 2, (2, 4)),
        (6, (0, 0, 0, 0, 1, 2), 3, (4, 1, 1)),
        # No division places these; what is wrong is said where the teacher is divided.
        (4, (3, 2, 1, 0), 2, (2, 2)),
        (4, (0, 0, 0, 1), 3, (2, 1, 1)),
    ],
)
def test_student_stages(
    num_layers: int, teachers: Sequence[int], num_stages: int, expected: tuple[int, ...]
) -> None:
    pairs = pairs_of(*enumerate(teachers))
    running = max(pair.student for pair in pairs) + 1
    assert student_stages(num_layers, pairs, num_stages, num_running=running) == expected


def test_fewer_student_layers_than_stages() -> None:
    with pytest.raises(UserError, match=r"5 pipeline stages.* 4 layers"):
        student_stages(4, pairs_of((3, 3)), 5, num_running=4)


@pytest.mark.parametrize("layers", ["all", "last", "even"])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_proportional_maps_are_placed(num_stages: int, layers: str) -> None:
    """Whenever the tapped layers have at least as many teacher layers as there are stages."""
    placed = 0
    for student, teacher in itertools.product(range(num_stages, 11), range(1, 14)):
        pairs = layer_pairs(
            layers,  # type: ignore[arg-type]
            "proportional",
            num_student_layers=student,
            num_teacher_layers=teacher,
        )
        if layers != "last" and len({pair.teacher for pair in pairs}) < num_stages:
            continue
        placed += 1
        running, depth = pairs[-1].student + 1, depth_of(pairs)
        student_counts = student_stages(student, pairs, num_stages, num_running=running)
        teacher_counts = teacher_stages(pairs, student_counts, depth=depth)
        assert len(student_counts) == len(teacher_counts) == num_stages
        assert min(student_counts) >= 1
        assert sum(student_counts) == student
        assert sum(teacher_counts) == pairs[-1].teacher + 1, "cut at the deepest mapped layer"
        student_stage, teacher_stage = stages_of(student_counts), stages_of(teacher_counts)
        for pair in pairs:
            assert student_stage[pair.student] == teacher_stage[pair.teacher], pair
    assert placed > 20


def can_be_placed(pairs: list[LayerPair], student_counts: tuple[int, ...]) -> bool:
    """Tries every division of the teacher."""
    depth = depth_of(pairs)
    student_stage = stages_of(student_counts)
    for cuts in itertools.combinations_with_replacement(range(depth + 1), len(student_counts) - 1):
        stage = [sum(cut <= layer for cut in cuts) for layer in range(depth)]
        if all(student_stage[pair.student] == stage[pair.teacher] for pair in pairs):
            return True
    return False


def test_a_map_is_refused_only_when_no_division_places_it() -> None:
    draw = random.Random(0)
    outcomes = []
    for _ in range(400):
        student_counts = tuple(draw.randrange(1, 4) for _ in range(draw.randrange(1, 4)))
        depth = sum(student_counts)
        tapped = sorted(draw.sample(range(depth), draw.randrange(1, depth + 1)))
        targets = [draw.randrange(8) for _ in tapped]
        if draw.random() < 0.7:
            targets.sort()
        pairs = pairs_of(*zip(tapped, targets, strict=True))
        outcomes.append(can_be_placed(pairs, student_counts))
        if outcomes[-1]:
            counts = teacher_stages(
                draw.sample(pairs, len(pairs)), student_counts, depth=depth_of(pairs)
            )
            student_stage, teacher_stage = stages_of(student_counts), stages_of(counts)
            assert sum(counts) == max(targets) + 1
            assert all(student_stage[p.student] == teacher_stage[p.teacher] for p in pairs)
        else:
            with pytest.raises(UserError, match=r"taps\.layer_map: student layer"):
                teacher_stages(pairs, student_counts, depth=depth_of(pairs))
    assert 50 < sum(outcomes) < 350


def test_the_refusal_names_the_pair() -> None:
    with pytest.raises(UserError) as error:
        teacher_stages(pairs_of((0, 1), (1, 5), (2, 4), (3, 6)), (2, 2), depth=7)
    message = str(error.value)
    assert "student layer 2 (pipeline stage 1) is matched with teacher layer 4" in message
    assert "student layer 1 of the earlier stage 0 with teacher layer 5" in message


@pytest.mark.parametrize(
    ("pairs", "student_counts", "expected"),
    [
        # Only the last layer is mapped: nothing ties the stages before it.
        (pairs_of((3, 7)), (2, 2), (4, 4)),
        (pairs_of((5, 8)), (2, 2, 2), (3, 3, 3)),
        # Teacher layer 5 has to be on the first stage, so the first has more than half.
        (pairs_of((0, 5), (3, 7)), (2, 2), (6, 2)),
        # Teacher layer 1 has to be on the second stage.
        (pairs_of((2, 1), (3, 7)), (2, 2), (1, 7)),
        # The student's last stage has no tap, so the teacher has nothing to do there.
        (pairs_of((0, 0), (1, 3)), (2, 2), (4, 0)),
    ],
)
def test_the_teacher_is_divided_as_evenly_as_the_map_allows(
    pairs: list[LayerPair], student_counts: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert teacher_stages(pairs, student_counts, depth=depth_of(pairs)) == expected


@pytest.mark.parametrize(
    ("pairs", "expected"), [((), (3, 3, 3)), (((0, 0),), (3, 3, 3)), (((1, 5),), (6, 0, 3))]
)
def test_layers_behind_the_deepest_mapped_one_follow(
    pairs: tuple[tuple[int, int], ...], expected: tuple[int, ...]
) -> None:
    assert teacher_stages(pairs_of(*pairs), (2, 2, 2), depth=9) == expected
    assert student_stages(6, pairs_of(*pairs), 3, num_running=6) == (2, 2, 2)
