"""Metrics of generation, from what engines report."""

from typing import Any

import pytest

from megatron_oprd.rollout.engine import EngineUse
from megatron_oprd.rollout.pool import EngineWork
from megatron_oprd.training.metrics import engine_metrics
from megatron_oprd.training.rollout_source import StepRollouts


def use(*busy: float, responses: int = 4) -> EngineUse:
    return EngineUse(
        kv_cache_peaks=tuple(one / 8 for one in busy),
        busy_seconds=busy,
        preemptions=responses // 2,
        queued_seconds=0.25 * responses,
        num_responses=responses,
    )


def metrics(*work: EngineWork) -> dict[str, Any]:
    of_step = StepRollouts(
        rollouts=[], weight_sync_bytes=0, seconds_weight_sync=1.0, seconds_rollout=1.0, work=work
    )
    return engine_metrics(of_step)


def test_engines_that_are_waited_for() -> None:
    found = metrics(
        EngineWork(tokens=40, seconds=4.0, window=9.0, use=use(4.0)),
        EngineWork(tokens=10, seconds=2.0, window=9.0, use=use(2.0, responses=0)),
    )
    assert found["rollout_tokens_per_second"] == pytest.approx(50 / 4)
    assert found["rollout_tokens_per_second_of_engine"] == {"0": 10.0, "1": 5.0}
    assert found["rollout_idle_share"] == pytest.approx(1 - 3 / 4)
    assert found["rollout_kv_cache_peak_of_engine"] == {"0": 0.5, "1": 0.25}
    assert found["rollout_preemptions"] == 2
    assert found["rollout_queue_seconds"] == 0.25


def test_engines_in_the_background() -> None:
    """Their own clocks, against the time of the step."""
    found = metrics(
        EngineWork(tokens=40, seconds=0.0, window=8.0, use=use(4.0)),
        EngineWork(tokens=10, seconds=0.0, window=8.0, use=use(2.0)),
    )
    assert found["rollout_tokens_per_second"] == pytest.approx(50 / 4)
    assert found["rollout_tokens_per_second_of_engine"] == {"0": 10.0, "1": 5.0}
    assert found["rollout_idle_share"] == pytest.approx(1 - 3 / 8)


def test_servers_in_the_background() -> None:
    """The first rank speaks for all of them; which rank's tokens a server wrote nobody counts."""
    found = metrics(
        EngineWork(tokens=40, seconds=0.0, window=8.0, use=use(4.0, 2.0, 0.0)),
        EngineWork(tokens=10, seconds=0.0, window=8.0),
    )
    assert found["rollout_tokens_per_second"] == pytest.approx(50 / 4)
    assert found["rollout_tokens_per_second_of_engine"] == {"0": None, "1": None}
    assert found["rollout_idle_share"] == pytest.approx(1 - 2 / 8)
    assert list(found["rollout_kv_cache_peak_of_engine"]) == ["0", "1", "2"]


def test_servers_that_are_waited_for() -> None:
    found = metrics(
        EngineWork(tokens=40, seconds=4.0, window=9.0, use=use(4.0, 1.0)),
        EngineWork(tokens=10, seconds=2.0, window=9.0),
    )
    assert found["rollout_idle_share"] == pytest.approx(1 - 2.5 / 4)
    assert found["rollout_tokens_per_second_of_engine"] == {"0": 10.0, "1": 5.0}


def test_engines_that_measure_nothing() -> None:
    found = metrics(
        EngineWork(tokens=40, seconds=4.0, window=9.0),
        EngineWork(tokens=10, seconds=2.0, window=9.0),
    )
    assert found["rollout_idle_share"] == pytest.approx(1 - 3 / 4)
    assert found["rollout_kv_cache_peak_of_engine"] == {}
    assert found["rollout_preemptions"] is None


def test_a_step_without_generation() -> None:
    found = metrics(EngineWork(tokens=0, seconds=0.0, window=9.0))
    assert found["rollout_tokens_per_second"] is None
    assert found["rollout_idle_share"] is None
    assert found["rollout_tokens_per_second_of_engine"] == {}
