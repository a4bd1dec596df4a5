"""What of an interrupted write is done: a journal of each rank, with the units and their files."""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from megatron_oprd.weights.disk import sync

_PATTERN = "journal-*.jsonl"
_FIELDS = {"unit", "record", "files"}

_logger = logging.getLogger(__name__)


class Journals:
    """The journals of a write that may be continued and shared by ranks.

    A unit of an earlier write is done if its files had the noted sizes when this one began. Files
    that a rank of this write has finished are not looked at: over a network file system another
    machine may see them late.

    Args:
        folder: Where the journals are.
        content: The folder with the units' files.
        rank: This process, which has a journal of its own and reads all.

    Raises:
        OSError: On every call: the operating system refuses.
    """

    def __init__(self, folder: Path, content: Path, rank: int) -> None:
        self._folder = folder
        self._content = content
        self._rank = rank
        self._units: dict[str, dict[str, Any]] = {}
        self._bytes_read: dict[Path, int] = {}  # of each journal, up to a line that is not whole
        for note in self._new_notes():
            if self._has_files(note):
                self._units[note["unit"]] = note["record"]
        own = folder / f"journal-{rank}.jsonl"
        if own.exists():  # a line that was cut would spoil the next one
            os.truncate(own, self._bytes_read[own])
        self._own: IO[str] = own.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes this rank's journal."""
        self._own.close()

    def done(self, unit: str) -> dict[str, Any] | None:
        """The record of ``unit`` if any rank has done it."""
        if unit not in self._units:
            self._units |= {note["unit"]: note["record"] for note in self._new_notes()}
        return self._units.get(unit)

    def note(self, unit: str, record: Mapping[str, Any], files: Iterable[Path]) -> None:
        """Notes that ``unit`` is done, with the sizes of its files, once these are on the disk."""
        sizes = {}
        for file in files:
            sync(file)
            sizes[str(file.relative_to(self._content))] = file.stat().st_size
        self._own.write(json.dumps({"unit": unit, "record": record, "files": sizes}) + "\n")
        self._own.flush()
        os.fsync(self._own.fileno())
        self._units[unit] = dict(record)

    def _new_notes(self) -> list[dict[str, Any]]:
        """What the journals have got since they were read last."""
        notes = []
        for journal in self._folder.glob(_PATTERN):
            found, self._bytes_read[journal] = _read(journal, self._bytes_read.get(journal, 0))
            notes += found
        return notes

    def _has_files(self, note: Mapping[str, Any]) -> bool:
        for name, size in note["files"].items():
            file = self._content / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                if self._rank == 0:
                    _logger.warning(
                        "%s had %d bytes and %s; %s is written again",
                        file,
                        size,
                        "is missing" if found is None else f"has {found}",
                        note["unit"],
                    )
                return False
        return True


def any_done(folder: Path) -> bool:
    """Whether the journals in a folder have anything in them."""
    return any(journal.stat().st_size for journal in folder.glob(_PATTERN))


def _read(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """The notes from byte ``start`` on, up to a line that is not whole, and where that is."""
    notes: list[dict[str, Any]] = []
    length = start
    with path.open("rb") as stream:
        stream.seek(start)
        lines = stream.read().splitlines(keepends=True)
    for line in lines:
        try:
            note = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(note, dict) or not note.keys() >= _FIELDS:
            break
        notes.append(note)
        length += len(line)
    return notes, length
