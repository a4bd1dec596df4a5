"""A whole run of the training loop; rank 0 writes every step's rollouts, or what stopped it."""

import dataclasses
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_oprd.data.teacher_sequences import TeacherReader, TeacherSequence
from megatron_oprd.errors import UserError
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.rollout.engine import RolloutEngineError
from megatron_oprd.rollout.hf import HFEngine
from megatron_oprd.rollout.vllm.client import ServerClient
from megatron_oprd.training import loop
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.rollout_source import RolloutSource, StepRollouts
from megatron_oprd.training.step import Distiller
from tests.helpers.engine_processes import engine_processes
from tests.helpers.pairs import config_of
from tests.helpers.ranks import ROOT

STAND_IN = str(ROOT / "tests" / "fakes" / "vllm_stand_in")


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, pair, overrides}, with optional entries:

    folder: The run's, if not that of its name.
    faults: vLLM is the stand-in of tests/fakes/vllm_stand_in, with these faults.
    No other case of the same ranks may have the real one.
    kill_engine_before: A step whose rollouts the first rank's vLLM process is killed before.
    kill_server_before: The same of the last vLLM server that a rank started.
    kill_server_of: Ranks whose servers these are, if not the first.
    wait_for_server_before: A step before which that server, started again, has to answer.
    nodes: Whether each rank counts as a node.
    stale: Whether the hf engine keeps its first weights.
    all_weights: Whether the hf engine wants all weights each time.
    skip_steps: Numbers of steps that count as skipped.
    no_pairs: Whether nothing of the responses has a counterpart in what the teacher reads.
    """
    folder = directory / case.get("folder", case["name"])
    config = config_of(Path(case["pair"]), [*case["overrides"], f"output_dir={folder}"])
    rollouts: list[Any] = []
    of_step, distil = RolloutSource.of_step, Distiller.step

    def recorded(source: RolloutSource, step: int) -> StepRollouts:
        if case.get("kill_engine_before") == len(rollouts) and dist.get_rank() == 0:
            engine_processes()[0].kill()
        is_owner = dist.get_rank() in case.get("kill_server_of", [0])
        if case.get("kill_server_before") == len(rollouts) and is_owner:
            _kill_server()
        if case.get("wait_for_server_before") == len(rollouts):
            if is_owner:
                _wait_for_server()
            dist.barrier()
        found = of_step(source, step)
        rollouts.append(found.rollouts)
        return found

    def skipping(distiller: Distiller, *args: Any) -> Any:
        result = distil(distiller, *args)
        return dataclasses.replace(result, skipped=len(rollouts) - 1 in case["skip_steps"])

    def announced(distiller: Distiller, *args: Any) -> Any:
        (directory / f"{case['name']}.faults" / "updating").touch()
        return distil(distiller, *args)

    RolloutSource.of_step = recorded  # type: ignore[method-assign,assignment]
    if "skip_steps" in case:
        Distiller.step = skipping  # type: ignore[method-assign,assignment]
    load_weights = HFEngine.load_weights
    if case.get("stale"):
        HFEngine.load_weights = _load_first_weights(load_weights)  # type: ignore[method-assign]
    needs_all_weights = HFEngine.needs_all_weights
    if case.get("all_weights"):
        HFEngine.needs_all_weights = _yes  # type: ignore[method-assign,assignment]
    read = TeacherReader.read
    if case.get("no_pairs"):
        TeacherReader.read = _without_pairs(read)  # type: ignore[method-assign]
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_oprd").addHandler(handler)
    if "faults" in case:
        # Found by this process, and by the engine's.
        sys.path.append(STAND_IN)
        os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), STAND_IN))
        faults = directory / f"{case['name']}.faults"
        faults.mkdir(exist_ok=True)
        for fault in case["faults"]:
            (faults / fault).touch()
        os.environ["FAKE_VLLM_FAULTS"] = str(faults)
        Distiller.step = announced  # type: ignore[method-assign,assignment]
    if case.get("nodes"):
        os.environ |= {"GROUP_RANK": os.environ["RANK"], "LOCAL_RANK": "0"}
    stopped = ""
    with parallel_run(config.parallel, seed=config.seed) as context:
        plan = make_plan(config, world_size=dist.get_world_size())
        try:
            loop.train(plan, context)
        except (loop.TrainingDivergedError, RolloutEngineError, UserError) as error:
            stopped = str(error)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (rollouts, stopped))
        warned: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(warned, warnings)
        if context.rank == 0:
            assert all(one == everyone[0] for one in everyone), "ranks know different things"
            found = {"rollouts": rollouts, "stopped": stopped}
            found |= {"warnings": warnings, "warnings_of_ranks": warned}
            torch.save(found, directory / f"{case['name']}.pt")
    if case.get("nodes"):
        del os.environ["GROUP_RANK"]
        os.environ["LOCAL_RANK"] = os.environ["RANK"]
    RolloutSource.of_step = of_step  # type: ignore[method-assign]
    Distiller.step = distil  # type: ignore[method-assign]
    TeacherReader.read = read  # type: ignore[method-assign]
    HFEngine.load_weights = load_weights  # type: ignore[method-assign]
    HFEngine.needs_all_weights = needs_all_weights  # type: ignore[method-assign]
    logging.getLogger("megatron_oprd").removeHandler(handler)


def _own_server() -> psutil.Process:
    """The last vLLM server that this rank started."""
    servers = [
        process
        for process in psutil.Process().children(recursive=True)
        if any("vllm.entrypoints" in word for word in process.cmdline())
        and "--port" in process.cmdline()
        and "guard" not in " ".join(process.cmdline())
    ]
    return max(servers, key=lambda process: process.pid)


def _wait_for_server() -> None:
    options = dict(itertools.pairwise(_own_server().cmdline()))
    ServerClient(f"http://{options['--host']}:{options['--port']}").wait(300)


def _kill_server() -> None:
    """Kills this rank's server, and waits until its guard knows."""
    server = _own_server()
    guard = server.parent()
    assert guard is not None
    server.kill()
    # A zombie until this process asks for its exit code.
    while guard.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


def _without_pairs(read: Callable[..., TeacherSequence]) -> Callable[..., TeacherSequence]:
    return lambda *args: dataclasses.replace(read(*args), pairs=())


def _yes(engine: HFEngine) -> bool:
    return True


def _load_first_weights(load_weights: Callable[..., None]) -> Callable[..., None]:
    """An engine's `load_weights` that drops all weights but the first, and says nothing of it."""

    def load(
        engine: HFEngine, stream: Iterable[Any], *, version: int = 0, left_out: Collection[str] = ()
    ) -> None:
        if version == 0:
            load_weights(engine, stream, version=version)
        for _ in stream:
            pass
        engine.weights_version = version

    return load
