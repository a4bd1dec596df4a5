import re

import pytest

from megatron_oprd.config.advice import warnings_of
from megatron_oprd.config.schema import RunConfig, TapConfig


def test_the_defaults_get_no_warning() -> None:
    assert RunConfig().taps.alignment == "predictor"
    assert warnings_of(RunConfig().taps) == []
    assert warnings_of(TapConfig(positions="last")) == []
    assert warnings_of(TapConfig(layers="none", alignment="token")) == []


@pytest.mark.parametrize(
    ("taps", "number", "message"),
    [
        (TapConfig(alignment="token"), 1, "taps.alignment = token .* first response token"),
        (TapConfig(alignment="token", positions="last"), 2, "taps.positions = last .* last_k"),
    ],
)
def test_what_token_alignment_leaves_out(taps: TapConfig, number: int, message: str) -> None:
    warnings = warnings_of(taps)
    assert len(warnings) == number
    assert re.search(message, warnings[-1])
