"""Tables show text as it is."""

import pytest

from megatron_oprd.selftest.cases import Result, Status
from megatron_oprd.selftest.report import print_table


def test_an_extra_in_brackets_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    found = "pip install 'megatron-oprd[vllm]'"
    print_table(
        [
            Result(
                part="rollouts",
                name="one engine",
                num_ranks=1,
                status=Status.SKIPPED,
                found=found,
                seconds=0,
            )
        ]
    )
    printed = capsys.readouterr().out
    assert found in printed
    assert "skipped" in printed
