"""Ranks that fail, hang or report, each with a process of its own beside it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {rank: what it does when all are at work}; other ranks hang."""
    rank = os.environ["RANK"]
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (directory / f"helper_{rank}").write_text(str(helper.pid))
    (directory / f"pid_{rank}").write_text(str(os.getpid()))
    while len(list(directory.glob("pid_*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
    match case.get(rank):
        case "fail":
            raise ValueError(f"rank {rank} cannot")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "end":
            variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "OF_A_TEST")
            said = [os.environ.get(name, "unset") for name in variables]
            print(*said, hash("a string"), "torch" in sys.modules)
            helper.kill()
            helper.wait()
        case _:
            time.sleep(600)
