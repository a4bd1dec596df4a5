import time

import pytest

from megatron_oprd.heartbeat import heartbeat


def wait_for_lines(capsys: pytest.CaptureFixture[str], count: int) -> list[str]:
    """The first lines on stderr; they come from another thread."""
    text, deadline = "", time.monotonic() + 60
    while text.count("\n") < count and time.monotonic() < deadline:
        time.sleep(0.01)
        text += capsys.readouterr().err
    return text.splitlines()


def test_long_work_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    done = [3]
    with heartbeat(
        "rollouts",
        lambda seconds: f"{done[0]} of {8 if seconds > 0 else 0}",
        at_end=lambda seconds: f"{8 if seconds > 0.05 else 0} done",
        first_seconds=0.05,
    ):
        (first, *_) = wait_for_lines(capsys, 1)
        assert first.startswith("rollouts: 3 of 8, 0.0")
        assert first.endswith(" s so far")
        done[0] = 7
        assert "7 of 8, " in wait_for_lines(capsys, 1)[-1]
    (last,) = capsys.readouterr().err.splitlines()[-1:]
    assert last.startswith("rollouts: ended after ")
    assert last.endswith(" s, 8 done")


def test_work_that_cannot_be_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with heartbeat("waiting", first_seconds=0.02):
        (first, *_) = wait_for_lines(capsys, 1)
    assert first.startswith("waiting: 0.")


def test_short_work_and_other_ranks_say_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with heartbeat("rollouts", first_seconds=60):
        pass
    monkeypatch.setenv("RANK", "1")
    with heartbeat("rollouts", first_seconds=0.01):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_an_error_passes_through_and_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        with heartbeat("rollouts", first_seconds=0.01):
            wait_for_lines(capsys, 1)
            raise ValueError("engine")

    with pytest.raises(ValueError, match="engine"):
        fails()
    assert "rollouts: ended after" in capsys.readouterr().err
    time.sleep(0.1)
    assert capsys.readouterr().err == ""
