"""Files of graded responses, one JSON object a line, which an interrupted evaluation goes on with.

Beside ``NAME.jsonl`` lies ``NAME.settings.json``: what the responses depend on. Other settings, or
another model, never go on with the same file.
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
    """One graded response.

    Attributes:
        prompt_index: The problem's row in its file, from 0.
        sample_index: Which of the problem's n responses this is.
        response: The text, special tokens left out.
        num_tokens: Its tokens, what ended it included.
        finished: Whether it ended by itself; else it was cut at the length limit.
        answer: The answer that was found in it; None if none was.
        correct: Whether that is right.
        timed_out: Whether its grading was given up; it then counts as wrong.
    """

    prompt_index: int
    sample_index: int
    response: str
    num_tokens: int
    finished: bool
    answer: str | None
    correct: bool
    timed_out: bool

    def as_line(self) -> str:
        """The sample as a line of a file, with its end."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n"


class SamplesFile:
    """The samples of one model on one benchmark; they are written batch by batch, in order.

    A batch that was not written whole is written again: its responses then come from the same
    batch as without the interruption, to the last bit of the logits.

    Attributes:
        samples: What the file holds, whole batches only.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], batch_sizes: Sequence[int]):
        """Opens a file, or begins it.

        Args:
            path: ``.jsonl``; its folder is made where it is missing.
            settings: All that the samples depend on, as JSON has it.
            batch_sizes: Samples of each batch of the whole file.

        Raises:
            UserError: The file is of other settings, or has a line that is no sample.
        """
        check_settings(path, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        temporary.replace(_settings_file(path))
        self._path = path
        self._batch_sizes = list(batch_sizes)
        self.samples: list[Sample] = []
        self._read()

    @property
    def num_batches(self) -> int:
        """Batches that the file holds."""
        total, batches = 0, 0
        while total < len(self.samples):
            total += self._batch_sizes[batches]
            batches += 1
        return batches

    def append(self, batch: Sequence[Sample]) -> None:
        """Writes the next batch, to the disk."""
        assert len(batch) == self._batch_sizes[self.num_batches]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(sample.as_line() for sample in batch))
            file.flush()
            os.fsync(file.fileno())
        self.samples += batch

    def _read(self) -> None:
        """Reads whole batches and cuts the file behind them."""
        if not self._path.exists():
            return
        # A line without its end was cut off in the middle.
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
                    f"--output: line {number} of {self._path} is no sample ({error}); remove the "
                    "file, or give another folder"
                ) from error
        os.truncate(self._path, sum(len(line) + 1 for line in lines[:whole]))


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Checks that a file of samples, if there is one, is of these settings.

    Args:
        path: The ``.jsonl`` file.
        settings: Some of the settings; the others are not compared.

    Raises:
        UserError: It is not.
    """
    file = _settings_file(path)
    if not file.exists():
        if path.exists():
            raise UserError(
                f"--output: {path} has samples but {file.name}, which says what of, is missing; "
                "remove the file, or give another folder"
            )
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--output: {file} is not JSON: {error}; give another folder") from error
    for name, value in settings.items():
        if found.get(name) != value:
            raise UserError(
                f"--output: {path} has samples with {name} = {found.get(name)!r}, this evaluation "
                f"has {value!r}; they are not mixed: give another folder, or remove the file"
            )


def _settings_file(path: Path) -> Path:
    return path.with_suffix(".settings.json")
