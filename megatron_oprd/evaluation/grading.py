r"""Grades responses: extracts the final answer and compares it with math-verify.

The final answer is the content of the last ``\boxed{...}`` or the text after the last ``Answer:``,
whichever comes later. The benchmarks' prompts (MATH, AMC; DAPO-Math) ask for these forms. A
response with neither has no answer and is wrong, whatever numbers it mentions.
"""

import json
import re
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

# Far longer than any correct answer. Longer text is garbage that can block a parser.
MAX_ANSWER_CHARACTERS = 1000
_START_SECONDS = 120.0  # limit for the worker to import its modules

_BOX = re.compile(r"\\f?boxed\s*")
# The answer may be on the next line, or in Markdown's bold.
_ANSWER_LINE = re.compile(r"\banswer\s*:[\s*]*([^\n]+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Grade:
    """The grade of one response."""

    answer: str | None  # the extracted answer; None if there is none
    correct: bool
    timed_out: bool  # the comparison was stopped; the answer counts as wrong


def extract_answer(response: str) -> str | None:
    """Extracts the final answer of a response verbatim; None if there is none."""
    box_start, boxed = _last_box(response)
    lines = list(_ANSWER_LINE.finditer(response))
    line = lines[-1] if lines else None
    if line is None or line.start() < box_start:
        # Also for ``Answer: \boxed{5}``: the box starts after the line's match.
        return boxed
    stripped = _without_delimiters(line.group(1))
    return stripped or boxed


def _last_box(text: str) -> tuple[int, str | None]:
    r"""Start and content of the last complete, non-empty ``\boxed{...}``; else -1 and None."""
    for match in reversed(list(_BOX.finditer(text))):
        start = match.end()
        if text[start : start + 1] != "{":
            # TeX accepts an argument without braces: \boxed 5
            content = re.match(r"[^\s${}\\.,]+", text[start:])
            if content is not None:
                return match.start(), content.group()
            continue
        depth = 0
        for end in range(start, len(text)):
            if text[end] in "{}" and text[end - 1] != "\\":
                depth += 1 if text[end] == "{" else -1
            if depth == 0:
                content_text = text[start + 1 : end].strip()
                if content_text:
                    return match.start(), content_text
                break
    return -1, None


def _without_delimiters(text: str) -> str:
    """Strips Markdown's bold, maths delimiters and the full stop from an answer line."""
    text = text.strip().strip("*").strip().removesuffix(".").strip("*").strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(left) : -len(right)]
        # Not for $1$ or $2$: these delimiters belong to two formulas.
        if text.startswith(left) and text.endswith(right) and inner and left not in inner:
            return inner.strip()
    return text


class Grader:
    """Compares answers in a child process, which is killed when it exceeds the time limit.

    math-verify's own time limit uses an alarm signal: it works only in a main thread and cannot
    interrupt a long operation inside the interpreter, such as a power of large integers.
    """

    def __init__(self, *, timeout: float):
        """Sets the time limit of a comparison, in seconds; starts no process yet."""
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        # (answer, gold) -> (equal, timed out).
        self._known: dict[tuple[str, str], tuple[bool, bool]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def grade(self, response: str, gold: str) -> Grade:
        r"""Grades a response against the correct answer ``gold``, in a ``\boxed{}`` or plain."""
        answer = extract_answer(response)
        if answer is None:
            return Grade(answer=None, correct=False, timed_out=False)
        boxed = _last_box(gold)[1]
        correct, timed_out = self.compare(answer, gold if boxed is None else boxed)
        return Grade(answer=answer, correct=correct, timed_out=timed_out)

    def compare(self, answer: str, gold: str) -> tuple[bool, bool]:
        """Returns whether two answers are equal, and whether the comparison was stopped.

        Equal texts are equal without a comparison. A process that dies, e.g. for lack of memory,
        counts as stopped. Raises RuntimeError if the process does not start.
        """
        if answer.split() == gold.split():
            return True, False
        if len(answer) > MAX_ANSWER_CHARACTERS:
            return False, False
        key = (answer, gold)
        if key not in self._known:
            result = self._ask(answer, gold)
            self._known[key] = (bool(result), result is None)
        return self._known[key]

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            # kill() before communicate(), which would wait for a comparison that hangs.
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, answer: str, gold: str) -> bool | None:
        if self._process is None:
            self._start()
        self._send(answer, gold)
        line = self._receive(self._timeout)
        if line is None:
            self.close()
            return None
        return json.loads(line)

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_oprd.evaluation.grading_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # signals to the trainer's group must not end it in a step
        )
        # A first request, so that the time of the imports does not count for an answer.
        self._send("1", "1")
        if self._receive(_START_SECONDS) is None:
            self.close()
            raise RuntimeError(
                "the grading process does not start; see what "
                f"`{sys.executable} -m megatron_oprd.evaluation.grading_worker` says"
            )

    def _send(self, answer: str, gold: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        request = json.dumps({"answer": answer, "gold": gold}) + "\n"
        try:
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process ended; `_receive` reports it

    def _receive(self, seconds: float) -> bytes | None:
        """Returns the next line; None if the process timed out or ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        end = time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n"):
            left = max(end - time.monotonic(), 0.0)
            ready, _, _ = select.select([self._process.stdout], [], [], left)
            # read1 returns the available bytes; read and readline would block past the time limit.
            piece = self._process.stdout.read1() if ready else b""  # type: ignore[attr-defined]
            if not piece:
                return None
            line += piece
        return line
