"""A process that ends, hangs or fails is noticed, each in its time."""

import os
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from megatron_oprd.rollout.engine import RolloutEngineError
from megatron_oprd.rollout.vllm.engine_process import EngineProcess
from tests.helpers.ranks import ROOT


@pytest.fixture
def process() -> Iterator[EngineProcess]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = EngineProcess("tests.fakes.engine_child", environment=environment)
    yield process
    process.close()
    assert not psutil.pid_exists(process.pid)


def call(process: EngineProcess, what: str, argument: Any, seconds: float = 60) -> Any:
    process.send((what, argument), seconds=seconds)
    return process.receive(seconds=seconds, setting="timeout = 1")


def test_answers(process: EngineProcess) -> None:
    assert call(process, "answer", [1, "x"]) == [1, "x"]
    with pytest.raises(RolloutEngineError, match="process failed:\nits traceback"):
        call(process, "fail", "its traceback")
    assert call(process, "answer", 2) == 2


@pytest.mark.parametrize("what", ["exit", "leave_heir"])
def test_an_end_is_noticed_at_once(process: EngineProcess, what: str) -> None:
    """Also where a child of the process still has its end of the pipe."""
    started = time.monotonic()
    with pytest.raises(RolloutEngineError, match="ended with exit code 7"):
        call(process, what, 7)
    assert time.monotonic() - started < 30
    with pytest.raises(RolloutEngineError, match="ended with exit code 7"):
        call(process, "answer", 0)


def test_hanging(process: EngineProcess) -> None:
    assert call(process, "answer", 0) == 0
    with pytest.raises(RolloutEngineError, match=r"not answered for 0.5 s \(timeout = 1\)"):
        call(process, "hang", None, seconds=0.5)
    with pytest.raises(RolloutEngineError, match="ended with exit code -9"):
        call(process, "answer", 0)


def test_a_message_that_is_not_taken(process: EngineProcess) -> None:
    """It does not fit into the pipe, and its sender waits no longer than it should."""
    process.send(("hang", None), seconds=60)
    with pytest.raises(RolloutEngineError, match="has not taken a message"):
        process.send(("answer", b"x" * 10**7), seconds=0.5)
