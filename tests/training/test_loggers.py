import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_oprd.training.loggers import JsonLogger, Loggers, TensorBoardLogger
from megatron_oprd.training.samples import TextSample


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": step + 0.5,
        "cosine": 0.25,
        "loss_per_layer": {"0": step + 0.25, "3": step + 0.75},
        "grad_norm": 2.0,
        "skipped": False,
        **changes,
    }


def make(folder: Path, *, first_step: int = 0, tensorboard: bool = False) -> Loggers:
    jsonl = JsonLogger(folder, first_step=first_step)
    if not tensorboard:
        return Loggers([jsonl])
    return Loggers([jsonl, TensorBoardLogger(folder, first_step=first_step)])


def write(
    folder: Path, records: list[dict[str, Any]], *, first_step: int = 0, tensorboard: bool = False
) -> None:
    loggers = make(folder, first_step=first_step, tensorboard=tensorboard)
    for record in records:
        loggers.log(record)
    loggers.close()


def read(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_a_record_a_step(tmp_path: Path) -> None:
    records = [metrics(step) for step in range(3)]
    write(tmp_path / "new" / "run", records)
    assert read(tmp_path / "new" / "run") == records
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["metrics.jsonl"]


def test_records_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    loggers = make(tmp_path)
    loggers.log(metrics(0))
    assert read(tmp_path) == [metrics(0)]
    loggers.close()


@pytest.mark.parametrize("half_written", ["", '{"step": 4, "lo', '{"step": 1'])
def test_a_resumed_run_replaces_its_records(tmp_path: Path, half_written: str) -> None:
    write(tmp_path, [metrics(step) for step in range(4)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(half_written)
    again = [metrics(step, loss=100.0) for step in (2, 3, 4)]
    write(tmp_path, again, first_step=2)
    assert read(tmp_path) == [metrics(0), metrics(1), *again]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_start_keeps_nothing(tmp_path: Path) -> None:
    write(tmp_path, [metrics(step) for step in range(4)])
    write(tmp_path, [metrics(0, loss=7.0)])
    assert read(tmp_path) == [metrics(0, loss=7.0)]


def test_missing_and_non_finite_values(tmp_path: Path) -> None:
    write(
        tmp_path,
        [
            metrics(0, loss=None, loss_per_layer={"0": None, "3": 2.0}),
            metrics(1, loss=math.nan, grad_norm=math.inf, loss_per_layer={"0": -math.inf}),
        ],
        tensorboard=True,
    )
    first, second = read(tmp_path)
    assert (first["loss"], first["loss_per_layer"]) == (None, {"0": None, "3": 2.0})
    assert (second["loss"], second["grad_norm"]) == (None, None)
    assert second["loss_per_layer"] == {"0": None}
    assert [step for step, _ in scalars(tmp_path, "loss_per_layer/3")] == [0]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard(tmp_path: Path) -> None:
    write(tmp_path, [metrics(step) for step in range(4)], tensorboard=True)
    assert scalars(tmp_path, "loss") == [(0, 0.5), (1, 1.5), (2, 2.5), (3, 3.5)]
    assert scalars(tmp_path, "loss_per_layer/3") == [(0, 0.75), (1, 1.75), (2, 2.75), (3, 3.75)]
    assert scalars(tmp_path, "skipped") == [(step, 0.0) for step in range(4)]

    write(tmp_path, [metrics(2, loss=9.0), metrics(3, loss=8.0)], first_step=2, tensorboard=True)
    assert scalars(tmp_path, "loss") == [(0, 0.5), (1, 1.5), (2, 9.0), (3, 8.0)]


class Failing:
    def log(self, metrics: dict[str, Any]) -> None:
        pass

    def log_samples(self, step: int, samples: Sequence[TextSample]) -> None:
        pass

    def log_checkpoint(self, folder: Path, step: int) -> None:
        pass

    def close(self) -> None:
        raise OSError("the network is gone")


def test_one_that_cannot_be_closed_leaves_the_others_whole(tmp_path: Path) -> None:
    writer = TensorBoardLogger(tmp_path, first_step=0)
    loggers = Loggers([Failing(), writer, Failing()])
    loggers.log(metrics(0))
    with pytest.raises(OSError, match="network"):
        loggers.close()
    assert scalars(tmp_path, "loss") == [(0, 0.5)]


def test_samples(tmp_path: Path) -> None:
    """A resumed run writes those of its steps again."""
    sample = TextSample(
        prompt_index=3,
        prompt="a|b",
        response="c\nd",
        num_tokens=2,
        finished=False,
        weights_version=1,
    )
    for first_step in (0, 2):
        loggers = make(tmp_path, first_step=first_step, tensorboard=True)
        for step in range(first_step, 4, 2):
            loggers.log_samples(step, [sample])
        loggers.close()
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2]
    assert lines[0]["prompt"] == "a|b"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| 3 | a\\|b | c<br>d | 2, cut |" in text
