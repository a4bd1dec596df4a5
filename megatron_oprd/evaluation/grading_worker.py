"""The process in which math-verify compares answers; `grading.Grader` starts and ends it.

Reads one JSON object a line, ``{"answer": ..., "gold": ...}``, and answers each with one line,
``true`` or ``false``.
"""

import json
import logging
import os
import resource
import sys

from math_verify import LatexExtractionConfig, parse, verify

# An answer such as 9^{9^{9}} would take all memory there is before its time is up.
_MEMORY_LIMIT = 4 * 2**30
# Only what is in the box counts. (math-verify's plain expressions, which LaTeX includes, would be
# evaluated as Python.)
_TARGETS = (LatexExtractionConfig(boxed_match_priority=0),)


def equal(answer: str, gold: str) -> bool:
    """Whether math-verify calls two answers equal, with no limit on the time."""
    expected, found = (
        parse(rf"\boxed{{{text}}}", _TARGETS, parsing_timeout=None) for text in (gold, answer)
    )
    return verify(expected, found, timeout_seconds=None)


def main() -> None:
    """Answers line by line until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    logging.disable(logging.WARNING)  # that no time limit is set: the parent process has one
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # nothing that a library prints may come between the results
    for line in sys.stdin:
        print(json.dumps(equal(**json.loads(line))), file=results, flush=True)


if __name__ == "__main__":
    main()
