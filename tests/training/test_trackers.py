"""Trackers against their own offline modes, where they are installed, and against stand-ins."""

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_oprd.config.schema import DataConfig, ModelConfig, RunConfig, Tracker
from megatron_oprd.errors import UserError
from megatron_oprd.training.identity import RunIdentity
from megatron_oprd.training.samples import TextSample
from megatron_oprd.training.trackers import check_trackers, open_trackers

SAMPLE = TextSample(
    prompt_index=3,
    prompt="one plus one",
    response="two\n",
    num_tokens=2,
    finished=False,
    weights_version=1,
)


def config_of(folder: Path, *trackers: Tracker, **settings: Any) -> RunConfig:
    return RunConfig(
        output_dir=str(folder),
        model=ModelConfig(student="s", teacher="t"),
        data=DataConfig(prompts=["p.jsonl"]),
        trackers=list(trackers),
        project_name="additions",
        **settings,
    )


def identity_of(name: str = "0f" * 16) -> RunIdentity:
    return RunIdentity(name=name, day="2026-01-01", lr_decay_iters=9, contents={})


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": step + 0.5,
        "grad_norm": None,
        "skipped": False,
        "loss_per_layer": {"0": 0.25, "3": None},
        "eval/sums": {"pass@1": 0.75},
        **changes,
    }


class Standin(types.ModuleType):
    """A module that keeps the calls of the run that its ``init`` makes."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config = self
        self.id = "chosen"

    def init(self, **options: Any) -> "Standin":
        self.calls.append(("init", (), options))
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: self.calls.append((name, arguments, options))

    def of(self, name: str) -> list[tuple[Any, Any]]:
        return [(arguments, options) for called, arguments, options in self.calls if called == name]


@pytest.fixture
def standin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Standin:
    module = Standin(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


@pytest.mark.parametrize("standin", ["wandb"], indirect=True)
def test_wandb_is_told(standin: Standin, tmp_path: Path) -> None:
    (tracker,) = open_trackers(config_of(tmp_path / "first", "wandb"), identity_of())
    ((_, options),) = standin.of("init")
    assert (options["project"], options["name"]) == ("additions", "first")
    assert (options["id"], options["resume"]) == ("0f" * 16, "allow")
    assert options["config"]["optimizer.clip_grad"] == "1.0"
    tracker.log(metrics(4))
    tracker.log_checkpoint(tmp_path / "step_0000005", 5)
    tracker.close()
    assert standin.of("log") == [
        (
            (
                {
                    "loss": 4.5,
                    "skipped": False,
                    "loss_per_layer/0": 0.25,
                    "eval/sums/pass@1": 0.75,
                    "step": 4,
                },
            ),
            {},
        )
    ]
    assert standin.summary == {"checkpoint": str(tmp_path / "step_0000005")}
    assert standin.of("finish") == [((), {"exit_code": 0})]


@pytest.mark.parametrize("standin", ["swanlab"], indirect=True)
def test_swanlab_is_told(standin: Standin, tmp_path: Path) -> None:
    named = config_of(tmp_path, "swanlab", experiment_name="second")
    (tracker,) = open_trackers(named, identity_of())
    ((_, options),) = standin.of("init")
    assert (options["project"], options["name"]) == ("additions", "second")
    tracker.log(metrics(4))
    ((arguments, options),) = standin.of("log")
    assert options == {"step": 4}
    assert arguments[0]["skipped"] == 0.0
    assert type(arguments[0]["skipped"]) is float
    with pytest.raises(ValueError, match="a rank is gone") as error:
        _close_while_failing(tracker)
    assert standin.of("finish") == [((), {"state": "crashed", "error": repr(error.value)})]


def _close_while_failing(tracker: Any) -> None:
    try:
        raise ValueError("a rank is gone")
    finally:
        tracker.close()


@pytest.mark.parametrize("standin", ["wandb"], indirect=True)
def test_a_resumed_run_keeps_its_id_and_another_does_not(standin: Standin, tmp_path: Path) -> None:
    for name in ("aa", "aa", "bb"):
        open_trackers(config_of(tmp_path, "wandb"), identity_of(name))
    # The first start offers the run's own name; the tracker says which id it took.
    assert [options["id"] for _, options in standin.of("init")] == ["aa", "chosen", "bb"]
    kept = json.loads((tmp_path / "trackers.json").read_text())
    assert kept == {"run": "bb", "wandb": "chosen"}


def test_what_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(UserError, match=r"trackers has swanlab, .*megatron-oprd\[swanlab\]"):
        check_trackers(config_of(tmp_path, "swanlab"))


@pytest.mark.parametrize("standin", ["mlflow"], indirect=True)
def test_mlflow_needs_an_address(
    standin: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set"):
        check_trackers(config_of(tmp_path, "mlflow"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.0.0.1:5000")
    check_trackers(config_of(tmp_path, "mlflow"))


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    store = tmp_path / "store"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
    return store


def test_mlflow_store(mlflow_store: Path, tmp_path: Path) -> None:
    """What a run and its resume leave in a store, as MLflow's own client reads it."""
    mlflow = pytest.importorskip("mlflow")
    config = config_of(tmp_path / "run", "mlflow")
    for first, last in ((0, 3), (2, 5)):
        (tracker,) = open_trackers(config, identity_of())
        for step in range(first, last):
            tracker.log(metrics(step))
        tracker.log_samples(last, [SAMPLE])
        tracker.log_checkpoint(tmp_path / f"step_{last}", last)
        tracker.close()
    client = mlflow.tracking.MlflowClient()
    experiment = client.get_experiment_by_name("additions")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["optimizer.clip_grad"] == "1.0"
    assert run.data.tags["checkpoint"] == str(tmp_path / "step_5")
    assert run.data.metrics == {
        **{"loss": 4.5, "skipped": 0.0, "loss_per_layer/0": 0.25, "eval/sums/pass_at_1": 0.75}
    }
    # The repeated step is there twice, with the same value.
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {(one.step, one.value) for one in history} == {(s, s + 0.5) for s in range(5)}
    files = [one.path for one in client.list_artifacts(run.info.run_id, "samples")]
    assert files == ["samples/step_0000003.json", "samples/step_0000005.json"]
    text = Path(client.download_artifacts(run.info.run_id, files[0], str(tmp_path))).read_text()
    assert json.loads(text) == [dataclasses.asdict(SAMPLE)]


def test_mlflow_that_fails_costs_a_warning(
    mlflow_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    (tracker,) = open_trackers(config_of(tmp_path / "run", "mlflow"), identity_of())
    for meta in mlflow_store.rglob("meta.yaml"):
        meta.unlink()
    tracker.log(metrics(3))
    assert "warning: MLflow did not take the metrics of step 3" in capsys.readouterr().err
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI does not take the run"):
        open_trackers(config_of(tmp_path / "run", "mlflow"), identity_of())


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _ in range(2):
        (tracker,) = open_trackers(config_of(tmp_path, "wandb"), identity_of())
        tracker.log(metrics(0))
        tracker.log_samples(0, [SAMPLE])
        tracker.log_checkpoint(tmp_path / "step_1", 1)
        assert wandb.run.summary["checkpoint"] == str(tmp_path / "step_1")
        assert wandb.run.config["optimizer.clip_grad"] == "1.0"
        tracker.close()
    runs = sorted(tmp_path.glob("wandb/offline-run-*"))
    # Both under one id, which `wandb sync` makes one run of.
    assert {folder.name.rsplit("-", 1)[1] for folder in runs} == {"0f" * 16}
    tables = list(tmp_path.rglob("*.table.json"))
    assert tables
    table = json.loads(tables[0].read_text())
    assert table["data"] == [list(dataclasses.asdict(SAMPLE).values())]


def test_swanlab_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    (tracker,) = open_trackers(config_of(tmp_path, "swanlab"), identity_of())
    tracker.log(metrics(0))
    tracker.log_samples(0, [SAMPLE])
    tracker.log_checkpoint(tmp_path / "step_1", 1)
    tracker.close()
    texts = [file.read_text() for file in (tmp_path / "swanlog").rglob("*.txt")]
    assert f"{SAMPLE.prompt}\n\n{SAMPLE.response}" in texts
