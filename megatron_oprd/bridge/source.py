"""What training asks of a bridge, whichever file it comes from."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from megatron_oprd.config import TapConfig
from megatron_oprd.errors import UserError
from megatron_oprd.losses.bridge import Projectors
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.taps.layer_map import LayerPair

BUILD_ANOTHER = "Build one for this run with python -m megatron_oprd.build_bridge"


class BridgeSource(Protocol):
    """A bridge on disk, of which no projector was read yet."""

    @property
    def rank(self) -> int:
        """Rows of every projector."""

    def check(
        self,
        *,
        student: Architecture,
        teacher: Architecture,
        pairs: Iterable[LayerPair],
        taps: TapConfig,
    ) -> None:
        """Checks that the bridge fits a run.

        Raises:
            UserError: It was made for something else; the message names what.
        """

    def read(self, pairs: Iterable[LayerPair], *, rank: int, device: torch.device) -> Projectors:
        """Reads the projectors of some pairs, and their leading ``rank`` rows only."""


def check_pairs(path: Path, wanted: Iterable[LayerPair], found: Iterable[LayerPair]) -> None:
    """Checks that a bridge has the pairs that a run wants.

    Raises:
        UserError: A student layer is missing, or matched with another teacher layer.
    """
    teacher_of = {pair.student: pair.teacher for pair in found}
    for pair in wanted:
        if pair.student not in teacher_of:
            has = ", ".join(map(str, sorted(teacher_of)))
            raise UserError(
                f"taps.layers selects student layer {pair.student}, which bridge.path = {path} "
                f"does not have (it has {has}). {BUILD_ANOTHER}"
            )
        if teacher_of[pair.student] != pair.teacher:
            raise UserError(
                f"bridge.path = {path} matches student layer {pair.student} with teacher layer "
                f"{teacher_of[pair.student]}, taps.layer_map with {pair.teacher}. {BUILD_ANOTHER}"
            )
