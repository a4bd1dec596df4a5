"""A rank: ``python -m megatron_oprd.selftest.worker JOB``. `agents` starts it.

It runs the job's cases one after another. Rank 0 appends a line for each case to the job's file of
results. A case that fails otherwise than by a finding ends the rank, and the agents start the cases
that are left anew.
"""

import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

from megatron_oprd.errors import UserError
from megatron_oprd.selftest.cases import (
    CaseFailedError,
    CaseSkippedError,
    CaseWarning,
    Place,
    Status,
)


def main() -> None:
    """Runs the cases of a job."""
    threading.Thread(target=_end_with_the_agent, daemon=True).start()
    job = json.loads(Path(sys.argv[1]).read_text())
    place = Place(models=Path(job["models"]), folder=Path(job["folder"]))
    # Before any case: once the CPU stands in for a GPU, megatron-core cannot be imported any more.
    modules = [importlib.import_module(f"{__package__}.{case['kind']}") for case in job["cases"]]
    for case, port, module in zip(job["cases"], job["ports"], modules, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        print(f"--- {case['part']}: {case['name']}", flush=True)
        start = time.monotonic()
        try:
            status, found = Status.OK, module.run(case["arguments"], place)
        except CaseFailedError as failure:
            status, found = Status.FAILED, str(failure)
        except CaseSkippedError as reason:
            status, found = Status.SKIPPED, str(reason)
        except CaseWarning as warning:
            status, found = Status.WARNING, str(warning)
        except UserError as error:
            # Every rank finds it, before the ranks work together.
            status, found = Status.FAILED, str(error)
        if os.environ["RANK"] == "0":
            line = {"status": status, "found": found, "seconds": time.monotonic() - start}
            with Path(job["results"]).open("a") as results:
                results.write(json.dumps(line) + "\n")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _end_with_the_agent() -> None:
    """Ends this process when the agent has gone, even if it was killed."""
    # The agent writes nothing, and holds the other end. sys.stdin would be locked meanwhile, and a
    # forked process that saves a checkpoint closes it first.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
