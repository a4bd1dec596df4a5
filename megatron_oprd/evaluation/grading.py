r"""Grades responses: finds the final answer and has math-verify compare it with the right one.

The final answer is what stands in the last ``\boxed{...}`` or behind the last ``Answer:``,
whichever comes later, as the benchmarks' prompts (MATH, AMC; DAPO-Math) ask for it. A response with
neither has no answer and is wrong, whatever numbers it mentions.
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

# Far beyond any right answer; what is longer is garbage, which can take a parser forever.
MAX_ANSWER_CHARACTERS = 1000
_START_SECONDS = 120.0

_BOX = re.compile(r"\\f?boxed\s*")
# The answer may stand on the line below, and in Markdown's bold.
_ANSWER_LINE = re.compile(r"\banswer\s*:[\s*]*([^\n]+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Grade:
    """How one response was graded.

    Attributes:
        answer: The answer that was found in it; None if none was.
        correct: Whether it equals the right one.
        timed_out: Whether the comparison was given up; such an answer is not correct.
    """

    answer: str | None
    correct: bool
    timed_out: bool


def extract_answer(response: str) -> str | None:
    """The final answer of a response, as it stands there, or None."""
    box_start, boxed = _last_box(response)
    lines = list(_ANSWER_LINE.finditer(response))
    line = lines[-1] if lines else None
    if line is None or line.start() < box_start:
        # ``Answer: \boxed{5}`` is a box behind an answer line.
        return boxed
    stripped = _without_delimiters(line.group(1))
    return stripped or boxed


def _last_box(text: str) -> tuple[int, str | None]:
    r"""Where the last whole ``\boxed{...}`` that has a content begins, and the content."""
    for match in reversed(list(_BOX.finditer(text))):
        start = match.end()
        if text[start : start + 1] != "{":
            # TeX takes one character where there are no braces: \boxed 5
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
    """An answer line's content without Markdown's bold, maths delimiters and the full stop."""
    text = text.strip().strip("*").strip().removesuffix(".").strip("*").strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and inner and left not in inner:
            return inner.strip()
    return text


class Grader:
    """Compares answers in a process of its own, which is ended when it takes too long.

    math-verify's own time limit is an alarm signal: it works in a main thread only, and cannot
    interrupt a long operation inside the interpreter (a power of large integers, say).
    """

    def __init__(self, *, timeout: float):
        """Starts nothing yet.

        Args:
            timeout: Seconds that one comparison may take.
        """
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
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
        r"""Grades a response.

        Args:
            response: What the model wrote.
            gold: The right answer, in a ``\boxed{}`` or plain.
        """
        answer = extract_answer(response)
        if answer is None:
            return Grade(answer=None, correct=False, timed_out=False)
        boxed = _last_box(gold)[1]
        correct, timed_out = self.compare(answer, gold if boxed is None else boxed)
        return Grade(answer=answer, correct=correct, timed_out=timed_out)

    def compare(self, answer: str, gold: str) -> tuple[bool, bool]:
        """Whether two answers are equal, and whether the comparison was given up.

        Equal texts are equal. A process that ends without an answer (for memory) gave up, too.

        Raises:
            RuntimeError: The process does not start.
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
            start_new_session=True,  # what ends the trainer at its step's end does not end this
        )
        # The imports' time is not the first answer's.
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
            pass  # the process is gone, which `_receive` finds

    def _receive(self, seconds: float) -> bytes | None:
        """The next line, or None where the process took too long or ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        end = time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], end - time.monotonic())
            piece = self._process.stdout.read1() if ready else b""  # type: ignore[attr-defined]
            if not piece:
                return None
            line += piece
        return line
