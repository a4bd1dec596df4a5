"""An entry point, as torchrun would start it; what it prints is in the rank's log."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {program, arguments} and, optionally, columns of the terminal."""
    os.environ["COLUMNS"] = str(case.get("columns", 80))
    with (
        patch.object(sys, "argv", [case["program"], *case["arguments"]]),
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_module(f"megatron_oprd.{case['program']}", run_name="__main__")
    assert ended.value.code == 0
