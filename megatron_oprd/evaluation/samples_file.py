"""Files of graded responses, one JSON object per line, from which an evaluation resumes.

Next to ``NAME.jsonl``, ``NAME.settings.json`` stores everything the responses depend on. An
evaluation with other settings or another model never continues the file.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_oprd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One graded response."""

    prompt_index: int  # the problem's row in its file, from 0
    sample_index: int  # from 0, among the problem's n responses
    response: str  # without special tokens
    num_tokens: int  # the end token included
    finished: bool  # False: cut at the length limit
    answer: str | None  # the extracted answer; None if there is none
    correct: bool
    timed_out: bool  # grading was stopped; counts as wrong

    def as_line(self) -> str:
        """The sample as a line of JSON, newline included."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n"


class SamplesFile:
    """Samples of one model on one benchmark, written batch by batch, in order.

    A partly written batch is generated again as a whole: its responses then come from the same
    batch as without the interruption, to the last bit of the logits.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], batch_sizes: Sequence[int]):
        """Opens or creates the ``.jsonl`` file and its folder.

        Raises UserError if the file has other settings or an invalid line.
        """
        check_settings(path, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Write and rename: an interruption must not leave half a settings file.
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        temporary.replace(_settings_file(path))
        self._path = path
        self._batch_sizes = list(batch_sizes)
        self.samples: list[Sample] = []  # of complete batches
        self._read()

    @property
    def num_batches(self) -> int:
        """Batches in the file."""
        total, batches = 0, 0
        while total < len(self.samples):
            total += self._batch_sizes[batches]
            batches += 1
        return batches

    def append(self, batch: Sequence[Sample]) -> None:
        """Writes the next batch and syncs it to the disk."""
        assert len(batch) == self._batch_sizes[self.num_batches]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(sample.as_line() for sample in batch))
            file.flush()
            os.fsync(file.fileno())
        self.samples += batch

    def _read(self) -> None:
        """Reads the complete batches and truncates the file after them."""
        if not self._path.exists():
            return
        # The last element is empty, or a line that was cut off.
        *lines, _ = self._path.read_bytes().split(b"\n")
        whole = 0
        for size in self._batch_sizes:
            if whole + size > len(lines):
                break
            whole += size
        for number, line in enumerate(lines[:whole], start=1):
            try:
                self.samples.append(Sample(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"--output: line {number} of {self._path} is not a sample ({error}); remove "
                    "the file, or give another folder"
                ) from error
        os.truncate(self._path, sum(len(line) + 1 for line in lines[:whole]))


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Checks that an existing file of samples has the given settings; others are not compared.

    Raises UserError if a setting differs, or if the file of settings is missing or invalid.
    """
    file = _settings_file(path)
    if not file.exists():
        if path.exists():
            raise UserError(
                f"--output {path} has samples, but {file.name}, which says what they are of, is "
                "missing; remove the file of samples, or give another folder"
            )
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--output: {file} is not JSON: {error}; give another folder") from error
    for name, value in settings.items():
        if found.get(name) != value:
            raise UserError(
                f"--output {path} has samples with {name} = {found.get(name)!r}, but this "
                f"evaluation has {value!r}, and the two are not mixed; give another folder, or "
                "remove the file"
            )


def _settings_file(path: Path) -> Path:
    return path.with_suffix(".settings.json")
