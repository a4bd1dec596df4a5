"""Weights & Biases, MLflow and SwanLab as destinations of a run's metrics.

Where each sends to, and with which key, is set by its own environment variables, as everywhere
else. The packages are optional (the extras of pyproject.toml) and are imported here when they are
used.
"""

import dataclasses
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_oprd.config.schema import RunConfig, Tracker
from megatron_oprd.config.setting import settings_of, shown
from megatron_oprd.errors import UserError, say
from megatron_oprd.training.identity import RunIdentity
from megatron_oprd.training.loggers import Logger, flat
from megatron_oprd.training.samples import TextSample
from megatron_oprd.weights.disk import write_json

_IDS = "trackers.json"
# MLflow refuses more in one call.
_PARAMETERS_A_CALL = 100


def check_trackers(config: RunConfig) -> None:
    """Refuses trackers that cannot be used on this machine.

    Raises:
        UserError: A package is not installed, or MLflow has no address.
    """
    for name in config.trackers:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"trackers has {name}, but its package cannot be imported ({error}); install it "
                f"with pip install 'megatron-oprd[{name}]', or leave it out"
            ) from error
    if "mlflow" in config.trackers and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            "trackers has mlflow, but MLFLOW_TRACKING_URI is not set; set it to the address of the "
            "tracking server, or to another store of MLflow's"
        )


def open_trackers(config: RunConfig, identity: RunIdentity) -> list[Logger]:
    """Opens the run's trackers, on one process only.

    A resumed run goes on under its ids, which are in ``trackers.json`` of its folder.
    """
    opening: dict[Tracker, Callable[[_Run], Logger]] = {
        "wandb": WandbLogger,
        "mlflow": MlflowLogger,
        "swanlab": SwanlabLogger,
    }
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    run = _Run(
        folder=output_dir,
        project=config.project_name,
        name=config.experiment_name or output_dir.absolute().name,
        identity=identity.name,
        settings={found.key: shown(found.value) for found in settings_of(config)},
    )
    return [opening[name](run) for name in config.trackers]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What a tracker is told of a run."""

    folder: Path
    project: str
    name: str
    identity: str  # the same from its first start to its last resume
    settings: Mapping[str, str]  # every setting with its value

    def known_id(self, tracker: Tracker) -> str | None:
        """The id that the run has in a tracker; None if it is new there."""
        return self._ids().get(tracker)

    def keep_id(self, tracker: Tracker, value: str) -> None:
        """Keeps the id for a resume."""
        content = {"run": self.identity, **self._ids(), tracker: value}
        write_json(self.folder / _IDS, content)

    def _ids(self) -> dict[str, str]:
        path = self.folder / _IDS
        if not path.exists():
            return {}
        found = json.loads(path.read_text())
        # A run that begins anew in the same folder is another one.
        return found if found["run"] == self.identity else {}


class WandbLogger:
    """A run of Weights & Biases."""

    def __init__(self, run: _Run) -> None:
        import wandb

        known = run.known_id("wandb")
        self._wandb = wandb
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=known or run.identity,
            # "allow" also where the run is known: one that was written offline is not on the server
            # yet.
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            allow_val_change=True,  # a resumed run may have other settings of some kinds
        )
        run.keep_id("wandb", self._run.id)
        # Its own counter only grows. A resumed run repeats the steps after its checkpoint, and
        # their numbers would be thrown away.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: dict[str, Any]) -> None:
        """Sends the values that are not None."""
        self._run.log({**flat(metrics), "step": metrics["step"]})

    def log_samples(self, step: int, samples: Sequence[TextSample]) -> None:
        """Sends a table."""
        names = [field.name for field in dataclasses.fields(TextSample)]
        table = self._wandb.Table(
            columns=names, data=[[getattr(one, name) for name in names] for one in samples]
        )
        self._run.log({"samples": table, "step": step})

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Keeps the newest checkpoint's path in the run's summary."""
        self._run.summary["checkpoint"] = str(folder.absolute())

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish(exit_code=int(_is_failing()))


class MlflowLogger:
    """A run of MLflow.

    Its client waits for the server. A server that does not answer costs the run a warning and the
    numbers of the step, which ``metrics.jsonl`` has.
    """

    def __init__(self, run: _Run) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._metric, self._error = Metric, MlflowException
        self._client = MlflowClient()
        try:
            self._id = run.known_id("mlflow") or self._new(run, Param)
            self._client.update_run(self._id, status="RUNNING")
        except MlflowException as error:
            raise UserError(
                # Not the address itself, which may have a password in it.
                "trackers has mlflow, but the store of MLFLOW_TRACKING_URI does not take the run: "
                f"{_first_line(error)}; check the address and the server"
            ) from error

    def _new(self, run: _Run, param: Any) -> str:
        experiment = self._client.get_experiment_by_name(run.project)
        experiment_id = (
            self._client.create_experiment(run.project)
            if experiment is None
            else experiment.experiment_id
        )
        new = self._client.create_run(
            experiment_id, run_name=run.name, tags={"megatron_oprd.run": run.identity}
        )
        run_id: str = new.info.run_id
        # Once: MLflow does not let a parameter change.
        parameters = [param(_mlflow_name(key), value) for key, value in run.settings.items()]
        for start in range(0, len(parameters), _PARAMETERS_A_CALL):
            self._client.log_batch(run_id, params=parameters[start : start + _PARAMETERS_A_CALL])
        run.keep_id("mlflow", run_id)
        return run_id

    def log(self, metrics: dict[str, Any]) -> None:
        """Sends the values that are not None, in one call."""
        now, step = time.time_ns() // 10**6, metrics["step"]  # milliseconds
        numbers = [
            self._metric(_mlflow_name(name), float(value), now, step)
            for name, value in flat(metrics).items()
        ]
        self._send(f"the metrics of step {step}", self._client.log_batch, self._id, numbers)

    def log_samples(self, step: int, samples: Sequence[TextSample]) -> None:
        """Sends a JSON file of the step."""
        text = json.dumps([dataclasses.asdict(one) for one in samples], ensure_ascii=False)
        file = f"samples/step_{step:07d}.json"
        self._send(f"the samples of step {step}", self._client.log_text, self._id, text, file)

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Keeps the newest checkpoint's path as a tag."""
        path = str(folder.absolute())
        self._send("the checkpoint's path", self._client.set_tag, self._id, "checkpoint", path)

    def close(self) -> None:
        """Marks the run as finished, or as failed."""
        status = "FAILED" if _is_failing() else "FINISHED"
        self._send("the end", self._client.set_terminated, self._id, status)

    def _send(self, what: str, call: Callable[..., Any], *arguments: Any) -> None:
        try:
            call(*arguments)
        except self._error as error:
            say(f"warning: MLflow did not take {what} of this run: {_first_line(error)}")


class SwanlabLogger:
    """An experiment of SwanLab."""

    def __init__(self, run: _Run) -> None:
        import swanlab

        self._swanlab = swanlab
        self._run = swanlab.init(
            project=run.project,
            name=run.name,
            id=run.known_id("swanlab") or run.identity,
            resume="allow",
            log_dir=str(run.folder / "swanlog"),
            config=dict(run.settings),
        )
        run.keep_id("swanlab", run.identity)

    def log(self, metrics: dict[str, Any]) -> None:
        """Sends the values that are not None."""
        # Its numbers are floats; true and false are none.
        numbers = {name: float(value) for name, value in flat(metrics).items()}
        self._run.log(numbers, step=metrics["step"])

    def log_samples(self, step: int, samples: Sequence[TextSample]) -> None:
        """Sends each sample as a text."""
        texts = [
            self._swanlab.Text(
                f"{one.prompt}\n\n{one.response}",
                caption=f"prompt {one.prompt_index}, {one.num_tokens} tokens"
                f"{'' if one.finished else ', cut'}",
            )
            for one in samples
        ]
        self._run.log({"samples": texts}, step=step)

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Keeps the newest checkpoint's path in the experiment's configuration."""
        self._run.config.update({"checkpoint": str(folder.absolute())})

    def close(self) -> None:
        """Waits until everything is sent."""
        if _is_failing():
            self._run.finish(state="crashed", error=repr(sys.exc_info()[1]))
        else:
            self._run.finish()


def _is_failing() -> bool:
    """Whether an exception ends the run: `close` is called while it passes."""
    return sys.exc_info()[0] is not None


def _mlflow_name(name: str) -> str:
    """A name with the characters that MLflow takes: ``pass@1`` is ``pass_at_1``."""
    return re.sub(r"[^\w\-. /]", "_", name.replace("@", "_at_"))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
