"""Bridge folders: what is written is read, and what does not fit is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oprd.config.schema import TapConfig
from megatron_oprd.distill.bridge_file import BridgeFolder, check_bridge_place, open_bridge
from megatron_oprd.distill.layer_map import LayerPair
from megatron_oprd.errors import UserError
from megatron_oprd.models.open_checkpoint import open_checkpoint
from tests.helpers.bridges import save_random_bridge
from tests.helpers.pairs import save_pair
from tests.helpers.tiny import copy_with_config

CPU = torch.device("cpu")
PAIRS = [LayerPair(0, 0), LayerPair(1, 2), LayerPair(2, 3), LayerPair(3, 5)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bridge") / "pair"
    return save_pair(
        folder, "llama", teacher_layers=6, teacher_fields={"hidden_size": 64, "head_dim": 16}
    )


def check(bridge: Path, pair: Path, *, pairs: list[LayerPair] = PAIRS, **taps: Any) -> None:
    open_bridge(bridge).check(
        student=open_checkpoint(pair / "student").architecture,
        teacher=open_checkpoint(pair / "teacher").architecture,
        pairs=pairs,
        taps=TapConfig(**taps),
    )


def test_round_trip(pair: Path, tmp_path: Path) -> None:
    written = save_random_bridge(tmp_path / "bridge", pair)
    check(tmp_path / "bridge", pair)
    bridge = open_bridge(tmp_path / "bridge")
    assert bridge.rank == 6
    read = bridge.read(PAIRS, rank=6, device=CPU)
    for name in ("student", "teacher", "mean"):
        found, expected = getattr(read, name), getattr(written, name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[layer], expected[layer]) for layer in expected)


def test_a_stage_reads_its_layers_and_leading_rows(pair: Path, tmp_path: Path) -> None:
    written = save_random_bridge(tmp_path / "bridge", pair)
    read = open_bridge(tmp_path / "bridge").read(PAIRS[1:3], rank=4, device=CPU)
    assert (sorted(read.student), sorted(read.teacher)) == ([1, 2], [2, 3])
    assert torch.equal(read.student[2], written.student[2][:4])
    assert torch.equal(read.teacher[3], written.teacher[3][:4])
    assert torch.equal(read.mean[3], written.mean[3])


def test_fewer_layers_and_other_positions_are_allowed(pair: Path, tmp_path: Path) -> None:
    save_random_bridge(tmp_path / "bridge", pair)
    check(tmp_path / "bridge", pair, pairs=PAIRS[2:], positions="last_k", k=3)


@pytest.mark.parametrize(
    ("changes", "run", "message"),
    [
        ({"alignment": "token"}, {}, r"made with taps\.alignment = token, .* predictor"),
        ({}, {"last_layer": "pre_norm"}, r"taps\.last_layer = post_norm, the run has pre_norm"),
        ({}, {"pairs": [LayerPair(1, 1)]}, r"student layer 1 with teacher layer 2, .* with 1"),
        ({}, {"pairs": [LayerPair(4, 5)]}, r"student layer 4, .* \(it has 0, 1, 2, 3\)"),
    ],
)
def test_a_bridge_of_another_run_is_refused(
    pair: Path, tmp_path: Path, changes: dict[str, Any], run: dict[str, Any], message: str
) -> None:
    save_random_bridge(tmp_path / "bridge", pair, **changes)
    with pytest.raises(UserError, match=message):
        check(tmp_path / "bridge", pair, **run)


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("teacher", {"num_hidden_layers": 7}, r"as teacher, of num_layers = 6; .* has 7"),
        (
            "teacher",
            {"rms_norm_eps": 1e-4},
            r"layernorm_epsilon = 1e-06; .* has 0\.0001",
        ),
        ("student", {"intermediate_size": 48}, r"ffn_hidden_size = 64; model\.student has 48"),
    ],
)
def test_a_bridge_of_other_models_is_refused(
    pair: Path, tmp_path: Path, model: str, fields: dict[str, Any], message: str
) -> None:
    save_random_bridge(tmp_path / "bridge", pair)
    copied = tmp_path / "pair"
    for name in ("student", "teacher"):
        copy_with_config(pair / name, copied / name, **(fields if name == model else {}))
    with pytest.raises(UserError, match=message):
        check(tmp_path / "bridge", copied)


def test_what_is_no_bridge_is_refused(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing has no manifest\.json"):
        open_bridge(tmp_path / "nothing")
    save_random_bridge(tmp_path / "bridge", pair)
    (tmp_path / "bridge" / "manifest.json").write_text('{"kind": "model"}')
    with pytest.raises(UserError, match=r"manifest\.json that is not a bridge's"):
        BridgeFolder(tmp_path / "bridge")


def test_only_bridges_are_replaced(pair: Path, tmp_path: Path) -> None:
    save_random_bridge(tmp_path / "bridge", pair)
    save_random_bridge(tmp_path / "bridge", pair, rank=3)
    assert open_bridge(tmp_path / "bridge").rank == 3
    with pytest.raises(UserError, match="holds no bridge"):
        check_bridge_place(pair / "teacher")
