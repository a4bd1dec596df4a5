import io
from typing import Any

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.text import Text

from megatron_oprd.weights.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_every_ten_seconds() -> None:
    seconds = [0.0]
    log = io.StringIO()
    with Progress("copy", 4 * 10**9, stream=log, clock=lambda: seconds[0]) as progress:
        for second in range(1, 41):
            seconds[0] = float(second)
            progress.advance(10**8)
    assert log.getvalue().splitlines() == [
        "copy: 25% of 4.00GB, 100MB/s, 00:10 since start, 00:30 left",
        "copy: 50% of 4.00GB, 100MB/s, 00:20 since start, 00:20 left",
        "copy: 75% of 4.00GB, 100MB/s, 00:30 since start, 00:10 left",
        "copy: 100% of 4.00GB, 100MB/s, 00:40 since start, 00:00 left",
    ]


def test_short_or_hidden_work_leaves_nothing_in_a_log() -> None:
    seconds = [0.0]
    for shown, end in ((True, 9.9), (False, 99.0)):
        log = io.StringIO()
        with Progress("copy", 10, stream=log, shown=shown, clock=lambda: seconds[0]) as progress:
            seconds[0] = end
            progress.advance(10)
        assert log.getvalue() == ""
        seconds[0] = 0.0


def test_other_units() -> None:
    seconds = [0.0]
    log = io.StringIO()
    with Progress("fit", 40, unit=" pairs", stream=log, clock=lambda: seconds[0]) as progress:
        seconds[0] = 10.0
        progress.advance(20)
    assert log.getvalue() == "fit: 50% of 40.0 pairs, 2.00 pairs/s, 00:10 since start, 00:10 left\n"


def test_the_live_view_of_a_run_gets_lines() -> None:
    terminal = Terminal()
    with Live(Text(""), console=Console(file=terminal)) as live:
        stream: Any = FileProxy(live.console, terminal)
        seconds = [0.0]
        with Progress("fit", 4, stream=stream, clock=lambda: seconds[0]) as progress:
            seconds[0] = 10.0
            progress.advance(2)
    assert "fit: 50% of 4.00B" in terminal.getvalue()
    assert "|" not in terminal.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    terminal = Terminal()
    with Progress("copy", 2000, stream=terminal) as progress:
        progress.advance(2000)
    assert "copy: 100%|" in terminal.getvalue()
    assert "2.00k/2.00k" in terminal.getvalue()
