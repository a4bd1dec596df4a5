"""The destinations of a run's metrics: their interface, JSONL files and TensorBoard."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from megatron_oprd.training.samples import TextSample


class Logger(Protocol):
    """A destination of a run's metrics; it is used on one process only."""

    def log(self, metrics: dict[str, Any]) -> None:
        """Writes a step's metrics: numbers, None, or numbers and None by key."""

    def log_samples(self, step: int, samples: Sequence[TextSample]) -> None:
        """Writes a step's samples."""

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Says where the checkpoint after ``step`` steps is."""

    def close(self) -> None:
        """Writes what is not written yet, and ends."""


class Loggers:
    """Writes to several destinations as to one `Logger`."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = loggers

    def log(self, metrics: dict[str, Any]) -> None:
        """Writes a step's metrics to all."""
        for one in self._loggers:
            one.log(metrics)

    def log_samples(self, step: int, samples: Sequence[TextSample]) -> None:
        """Writes a step's samples to all."""
        for one in self._loggers:
            one.log_samples(step, samples)

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Tells all of a checkpoint."""
        for one in self._loggers:
            one.log_checkpoint(folder, step)

    def close(self) -> None:
        """Closes all, also if one of them fails."""
        with contextlib.ExitStack() as stack:
            for one in self._loggers:
                stack.callback(one.close)


class JsonLogger:
    """Writes ``metrics.jsonl`` and ``samples.jsonl``.

    Args:
        output_dir: The run's folder.
        first_step: Records of this step and later ones are removed from the files; a resumed run
            writes them again.
    """

    def __init__(self, output_dir: Path, *, first_step: int) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir / "metrics.jsonl"
        self._samples_path = output_dir / "samples.jsonl"
        for file in (path, self._samples_path):
            _keep_records_before(file, first_step)
        self._file = path.open("a", buffering=1)  # by line, so that a killed run loses none

    def log(self, metrics: dict[str, Any]) -> None:
        """Adds a line. Non-finite values are null, because JSON has no NaN or infinity."""
        self._file.write(json.dumps(_finite(metrics), allow_nan=False) + "\n")

    def log_samples(self, step: int, samples: Sequence[TextSample]) -> None:
        """Adds a line a sample."""
        with self._samples_path.open("a", encoding="utf-8") as file:
            for sample in samples:
                line = {"step": step, **dataclasses.asdict(sample)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Writes nothing: the checkpoint is in the same folder as these files."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardLogger:
    """Writes TensorBoard's event files, to ``tensorboard/`` of the run's folder."""

    def __init__(self, output_dir: Path, *, first_step: int) -> None:
        # What an abandoned run wrote of this step and later ones is not shown.
        self._writer = SummaryWriter(output_dir / "tensorboard", purge_step=first_step)

    def log(self, metrics: dict[str, Any]) -> None:
        """Adds the values that are not None."""
        for name, value in flat(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])

    def log_samples(self, step: int, samples: Sequence[TextSample]) -> None:
        """Adds a table."""
        rows = [
            f"| {one.prompt_index} | {_cell(one.prompt)} | {_cell(one.response)} | "
            f"{one.num_tokens}{'' if one.finished else ', cut'} |"
            for one in samples
        ]
        table = ["| prompt | text | response | tokens |", "|---|---|---|---|", *rows]
        self._writer.add_text("samples", "\n".join(table), step)

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Adds the path as a text."""
        self._writer.add_text("checkpoint", str(folder), step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._writer.close()


def flat(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step by one name each, such as ``loss_per_layer/3``, without ``step``."""
    numbers = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            numbers.update({f"{name}/{key}": one for key, one in value.items() if one is not None})
        elif value is not None and name != "step":
            numbers[name] = value
    return numbers


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


def _finite(value: Any) -> Any:
    """The value with None in place of non-finite numbers."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_records_before(path: Path, first_step: int) -> None:
    """Removes the records of ``first_step`` and later ones."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        # A run that is killed while it writes leaves an incomplete line.
        except ValueError:
            continue
        if record["step"] < first_step:
            kept.append(line + "\n")
    # Replaced atomically: a crash here must not lose the records.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
