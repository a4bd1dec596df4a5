"""Writes a run's metrics to a JSONL file, TensorBoard, and the terminal."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_oprd.training.samples import TextSample

_WATCHED = ("loss", "cosine", "grad_norm", "tokens_per_second")


class Loggers:
    """Writes metrics to all destinations; created on one process only.

    Args:
        output_dir: The run's folder, which gets ``metrics.jsonl`` and ``tensorboard/``.
        first_step: Records of this step and later ones are removed from ``metrics.jsonl`` and
            ``samples.jsonl``; a resumed run writes them again.
        num_steps: Steps of the whole run.
        tensorboard: Whether to write TensorBoard's event files.
    """

    def __init__(
        self, output_dir: Path, *, first_step: int, num_steps: int, tensorboard: bool
    ) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir / "metrics.jsonl"
        self._samples_path = output_dir / "samples.jsonl"
        for file in (path, self._samples_path):
            _keep_records_before(file, first_step)
        self._file = path.open("a", buffering=1)  # by line, so that a killed run loses none
        self._writer = (
            SummaryWriter(output_dir / "tensorboard", purge_step=first_step)
            if tensorboard
            else None
        )
        self._interactive = sys.stderr.isatty()
        self._progress = tqdm(
            total=num_steps, initial=first_step, unit="step", disable=not self._interactive
        )

    def log(self, metrics: dict[str, Any]) -> None:
        """Writes a step's metrics. TensorBoard omits values that are None.

        Non-finite values are null in the JSON file, because JSON has no NaN or infinity.
        """
        step = metrics["step"]
        self._file.write(json.dumps(_finite(metrics), allow_nan=False) + "\n")
        if self._writer is not None:
            for name, value in metrics.items():
                if isinstance(value, dict):
                    for key, one in value.items():
                        if one is not None:
                            self._writer.add_scalar(f"{name}/{key}", one, step)
                elif value is not None and name != "step":
                    self._writer.add_scalar(name, value, step)
        watched = {
            name: "-" if metrics[name] is None else f"{metrics[name]:.4g}" for name in _WATCHED
        }
        self._progress.update(1)
        self._progress.set_postfix(watched)
        if not self._interactive:
            shown = "  ".join(f"{name} {value}" for name, value in watched.items())
            print(f"step {step}  {shown}", file=sys.stderr, flush=True)

    def log_samples(self, step: int, samples: Sequence[TextSample]) -> None:
        """Adds a step's samples to ``samples.jsonl`` and, as a table, to TensorBoard."""
        with self._samples_path.open("a", encoding="utf-8") as file:
            for sample in samples:
                line = {"step": step, **dataclasses.asdict(sample)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if self._writer is not None:
            rows = [
                f"| {one.prompt_index} | {_cell(one.prompt)} | {_cell(one.response)} | "
                f"{one.num_tokens}{'' if one.finished else ', cut'} |"
                for one in samples
            ]
            table = ["| prompt | text | response | tokens |", "|---|---|---|---|", *rows]
            self._writer.add_text("samples", "\n".join(table), step)

    def close(self) -> None:
        """Flushes and closes all destinations."""
        self._progress.close()
        self._file.close()
        if self._writer is not None:
            self._writer.close()


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
