"""What is tried: a case, its result, and how a case says that it failed or cannot run here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing that a number of ranks tries together."""

    part: str  # of the table
    name: str  # one within its part
    kind: str  # a module of this package, with ``run(arguments, place)``
    num_ranks: int
    seconds: float = 60  # the longest that it may take, without the ranks' start
    arguments: dict[str, Any] = field(default_factory=dict)


class Status(StrEnum):
    """How a case ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"  # it cannot run here
    NOT_RUN = "not run"  # no time was left


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of a case."""

    part: str
    name: str
    num_ranks: int
    status: Status
    found: str  # a line: what was measured, or what is wrong
    seconds: float  # 0 for what did not run

    @classmethod
    def of(cls, case: Case, status: Status, found: str, seconds: float = 0.0) -> "Result":
        """The result of a case."""
        return cls(
            part=case.part,
            name=case.name,
            num_ranks=case.num_ranks,
            status=status,
            found=found,
            seconds=seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Place:
    """The folders of a rank."""

    models: Path  # this machine's tiny models
    folder: Path  # for what cases leave for each other


class CaseFailedError(Exception):
    """A case found something wrong; its text is the finding, one line."""


class CaseSkippedError(Exception):
    """A case cannot run on this machine; its text says why, in one line."""


class CaseWarning(Exception):
    """A case ran and found something that is right but bad; its text is the finding."""


def names_of(results: Sequence[Result], status: Status) -> list[str]:
    """The cases that ended so, with their parts."""
    return [f"{one.part}: {one.name}" for one in results if one.status is status]
