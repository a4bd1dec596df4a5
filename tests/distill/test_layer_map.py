import json
from pathlib import Path
from typing import Any

import pytest

from megatron_oprd.distill.layer_map import (
    LayerPair,
    layer_pairs,
    proportional_layer_map,
    select_layers,
)
from megatron_oprd.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "oprd_reference.json"


def test_maps_of_the_reference_implementation() -> None:
    maps = json.loads(GOLDEN.read_text())["layer_maps_0based"]
    assert maps
    for depths, expected in maps.items():
        num_student_layers, num_teacher_layers = map(int, depths.split("->"))
        assert proportional_layer_map(num_student_layers, num_teacher_layers) == expected, depths


def test_modes_of_the_reference_implementation() -> None:
    modes = json.loads(GOLDEN.read_text())["layers_modes_0based"]
    assert modes
    for num_layers, by_mode in modes.items():
        for mode, expected in by_mode.items():
            assert select_layers(mode, int(num_layers)) == expected, (num_layers, mode)


def test_maps_written_out() -> None:
    assert proportional_layer_map(4, 7) == [0, 2, 4, 6]
    assert proportional_layer_map(1, 5) == [4]
    assert proportional_layer_map(5, 1) == [0, 0, 0, 0, 0]
    assert proportional_layer_map(28, 28) == list(range(28))


def test_halves_go_to_the_even_side() -> None:
    assert proportional_layer_map(3, 6) == [0, 2, 5]  # 2.5 -> 2
    assert proportional_layer_map(3, 4) == [0, 2, 3]  # 1.5 -> 2
    # 7 * 45 / 10 = 31.5 exactly, while 7 / 10 * 45 in floating point is below it.
    assert proportional_layer_map(11, 46)[7] == 32


def test_every_map_rises_from_the_first_layer_to_the_last() -> None:
    for num_student_layers in range(2, 30):
        for num_teacher_layers in range(1, 40):
            layer_map = proportional_layer_map(num_student_layers, num_teacher_layers)
            assert len(layer_map) == num_student_layers
            assert (layer_map[0], layer_map[-1]) == (0, num_teacher_layers - 1)
            assert layer_map == sorted(layer_map)


@pytest.mark.parametrize("depths", [(0, 4), (4, 0), (-1, 4)])
def test_a_model_without_layers_is_an_error(depths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        proportional_layer_map(*depths)


def test_listed_layers_are_taken_as_they_are() -> None:
    assert select_layers([0, 3, 5], 6) == [0, 3, 5]
    assert select_layers((5,), 6) == [5]


def test_the_last_n_layers() -> None:
    assert select_layers("last_n", 6, n=2) == [4, 5]
    assert select_layers("last_n", 6, n=1) == select_layers("last", 6)
    assert select_layers("last_n", 6, n=6) == select_layers("all", 6)
    with pytest.raises(UserError, match=r"taps\.n = 7 .* 6 layers"):
        select_layers("last_n", 6, n=7)


@pytest.mark.parametrize(
    ("layers", "num_layers", "message"),
    [
        ("odd", 1, "taps.layers = odd .* 1 layers"),
        ([1, 6], 6, "has 6; the student's layers are 0 to 5"),
        ([-1, 2], 6, "has -1; the student's layers are 0 to 5"),
    ],
)
def test_mistakes_in_layers(layers: Any, num_layers: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        select_layers(layers, num_layers)
    assert str(error.value).startswith("taps.layers ")


def test_proportional_pairs_of_selected_layers() -> None:
    pairs = layer_pairs("odd", "proportional", num_student_layers=4, num_teacher_layers=7)
    assert pairs == [LayerPair(student=1, teacher=2), LayerPair(student=3, teacher=6)]
    pairs = layer_pairs([2], "proportional", num_student_layers=4, num_teacher_layers=7)
    assert pairs == [LayerPair(student=2, teacher=4)]


def test_listed_pairs_belong_to_the_selected_layers_and_need_not_rise() -> None:
    pairs = layer_pairs([0, 3], [5, 2], num_student_layers=4, num_teacher_layers=7)
    assert pairs == [LayerPair(student=0, teacher=5), LayerPair(student=3, teacher=2)]


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [
        ([0, 1, 2, 3], r"4 teacher layers \[0, 1, 2, 3\]; it must have 2, .* \[1, 3\]"),
        ([0, 7], "has 7; the teacher's layers are 0 to 6"),
        ([-1, 3], "has -1; the teacher's layers are 0 to 6"),
    ],
)
def test_mistakes_in_layer_map(layer_map: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        layer_pairs("odd", layer_map, num_student_layers=4, num_teacher_layers=7)
    assert str(error.value).startswith("taps.layer_map ")
