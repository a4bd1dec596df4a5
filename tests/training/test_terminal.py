import io
import sys
from typing import Any

import pytest

from megatron_oprd.training.step_line import step_fields, step_line
from megatron_oprd.training.terminal import TerminalLogger


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 0.5,
        "cosine": 0.25,
        "grad_norm": 2.0,
        "seconds_step": 20.0,
        "seconds_rollout": 10.0,
        "seconds_teacher": 2.0,
        "seconds_student": 4.0,
        "seconds_optimizer": 1.0,
        "seconds_weight_sync": 1.0,
        "tokens_per_second": 1234.5,
        "rollout_tokens_per_second": 2000.0,
        "peak_memory_gb": 12.25,
        "tflops_per_gpu": 123.4,
        "mfu": 0.125,
        **changes,
    }


def test_the_line_of_a_step() -> None:
    fields = step_fields(metrics(3), steps_left=6, seconds_left=3725.4)
    assert step_line(fields) == (
        "step 3  loss 0.5  cosine 0.25  grad_norm 2  time 20 s (rollout 50%, teacher 10%, "
        "student 20%, optimizer 5%, weight sync 5%, other 10%)  tokens/s 1234  rollout tokens/s "
        "2000  memory 12.2 GB  TFLOP/s per GPU 123  MFU 12.5%  left 6 steps, 1:02:05"
    )


def test_what_a_step_does_not_have_is_left_out() -> None:
    nothing = metrics(
        0,
        loss=None,
        grad_norm=float("inf"),
        rollout_tokens_per_second=None,
        tflops_per_gpu=None,
        mfu=None,
    )
    fields = step_fields(nothing, steps_left=1, seconds_left=0.0)
    assert (fields["loss"], fields["grad_norm"]) == ("-", "inf")
    assert not {"rollout tokens/s", "TFLOP/s per GPU", "MFU", "eval_score"} & fields.keys()
    evaluated = step_fields(metrics(0, eval_score=0.75), steps_left=1, seconds_left=0.0)
    assert evaluated["eval_score"] == "0.75"


def test_the_time_left_is_that_of_the_last_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """A first step of 20 s, 500 s after the start, then steps of 10 s with what is between them."""
    now = [0.0]
    terminal = TerminalLogger(first_step=4, num_steps=104, clock=lambda: now[0])
    now[0] = 500.0
    terminal.log(metrics(4))
    for step in range(5, 30):
        now[0] += 10.0
        terminal.log(metrics(step))
    terminal.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 26
    assert lines[0].endswith("left 99 steps, 0:33:00")
    assert lines[1].endswith("left 98 steps, 0:24:30")  # 98 steps of 15 s
    assert lines[-1].endswith("left 74 steps, 0:12:20")  # 74 steps of 10 s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    terminal = TerminalLogger(first_step=0, num_steps=4)
    terminal.log(metrics(0, loss=0.625))
    print("an engine was restarted", file=sys.stderr)
    terminal.log(metrics(1, loss=0.375))
    terminal.close()
    assert sys.stderr is screen
    text = screen.getvalue()
    # The last view stays, the line above it.
    assert text.index("an engine was restarted") < text.rindex("0.375")
    for shown in ("rollout 50%", "12.2 GB", "12.5%", "2 steps, 0:0"):
        assert shown in text
