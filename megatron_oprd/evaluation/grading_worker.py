"""Child process in which math-verify compares answers; `grading.Grader` starts and ends it.

Each input line is a JSON object, ``{"answer": ..., "gold": ...}``; each output line ``true`` or
``false``.

A worker of `multiprocessing`, as in pebble's `ProcessPool`, grades as fast (26 to 46 answers/s on
two cores), but first imports the program's main module: after `evaluate`, with torch, it starts in
6 s instead of 0.5 s and uses 1 GB of the limited address space before the first answer.
"""

import json
import logging
import os
import resource
import sys

from math_verify import LatexExtractionConfig, parse, verify

# Bytes. An answer such as 9^{9^{9}} would exhaust the memory before the time limit.
_MEMORY_LIMIT = 4 * 2**30
# Parse only the box. math-verify's plain expressions, which LaTeX includes, would be evaluated as
# Python.
_TARGETS = (LatexExtractionConfig(boxed_match_priority=0),)


def equal(answer: str, gold: str) -> bool:
    """Whether math-verify considers two answers equal; without a time limit."""
    expected, found = (
        parse(rf"\boxed{{{text}}}", _TARGETS, parsing_timeout=None) for text in (gold, answer)
    )
    return verify(expected, found, timeout_seconds=None)


def main() -> None:
    """Answers requests line by line until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    logging.disable(
        logging.WARNING
    )  # math-verify warns that it has no time limit; the parent has one
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # keeps libraries' prints out of the results
    for line in sys.stdin:
        print(json.dumps(equal(**json.loads(line))), file=results, flush=True)


if __name__ == "__main__":
    main()
