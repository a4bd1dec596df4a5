"""An entry point, as torchrun would start it; what it prints is in the rank's log."""

import os
import runpy
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {program, arguments}, with optional entries:

    columns: Of the terminal.
    code: The exit code.
    signal, signal_after: A signal that rank 1 gets when the run in a folder has done two steps. Its
        children get it, too, as when torchrun signals the process group.
    """
    os.environ["COLUMNS"] = str(case.get("columns", 80))
    if "signal" in case and os.environ["RANK"] == "1":
        metrics = Path(case["signal_after"]) / "metrics.jsonl"
        threading.Thread(target=_send, args=(case["signal"], metrics), daemon=True).start()
    with (
        patch.object(sys, "argv", [case["program"], *case["arguments"]]),
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_module(case["program"], run_name="__main__")
    assert ended.value.code == case.get("code", 0)


def _send(number: int, metrics: Path) -> None:
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        time.sleep(0.02)
    for child in psutil.Process().children(recursive=True):
        child.send_signal(number)
    os.kill(os.getpid(), number)
