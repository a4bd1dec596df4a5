"""What a server's metrics say of it: read from text, and added up between two looks."""

import logging
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from megatron_oprd.rollout.engine import EngineUse
from megatron_oprd.rollout.vllm import watch
from megatron_oprd.rollout.vllm.client import ServerError
from megatron_oprd.rollout.vllm.server import VLLMServer
from megatron_oprd.rollout.vllm.watch import ServerWatch, samples_of

TWO_ENGINES = """\
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="a b"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="a b"} 0.125
vllm:num_requests_running{engine="0"} 2.0
vllm:num_requests_running{engine="1"} 3.0
vllm:num_requests_waiting{engine="0"} 0.0
vllm:num_preemptions_total{engine="0"} 1.0
vllm:num_preemptions_total{engine="1"} 1e+01
vllm:num_preemptions_created{engine="0"} 1.79e+09
vllm:request_queue_time_seconds_bucket{engine="0",le="0.3"} 4.0
vllm:request_queue_time_seconds_sum{engine="0"} 1.5
vllm:request_queue_time_seconds_count{engine="0"} 4.0
"""


def test_the_text_of_two_engines() -> None:
    assert samples_of(TWO_ENGINES) == {
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:num_requests_running": 5,
        "vllm:num_requests_waiting": 0,
        "vllm:num_preemptions_total": 11,
        "vllm:request_queue_time_seconds_sum": 1.5,
        "vllm:request_queue_time_seconds_count": 4,
    }


def test_a_text_that_lacks_one() -> None:
    assert samples_of(TWO_ENGINES.replace("num_preemptions_total", "preempted")) == {}


class Server:
    """Says what it was told to."""

    url = "http://a:1"

    def __init__(self) -> None:
        self.text: str | None = ""
        self.say(responses=3)

    def say(self, *, cache: float = 0.0, running: int = 0, responses: int) -> None:
        values = {
            "kv_cache_usage_perc": cache,
            "num_requests_running": running,
            "num_requests_waiting": 0,
            "num_preemptions_total": 2 * responses,
            "request_queue_time_seconds_sum": 0.5 * responses,
            "request_queue_time_seconds_count": responses,
        }
        self.text = "".join(f"vllm:{name} {value}\n" for name, value in values.items())

    def metrics(self) -> str:
        if self.text is None:
            raise ServerError("it is down")
        return self.text


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, Server, ServerWatch]]:
    # Looks of the thread would come at any time.
    monkeypatch.setattr(watch, "SECONDS_BETWEEN_LOOKS", 3600.0)
    one, other = Server(), Server()
    watching = ServerWatch(cast(list[VLLMServer], [one, other]))
    yield one, other, watching
    watching.close()


def test_what_is_new_since_the_last_time(servers: tuple[Server, Server, ServerWatch]) -> None:
    """What a server did before counts for nothing."""
    one, other, watching = servers
    assert watching.take() is None
    one.say(cache=0.5, running=1, responses=7)
    time.sleep(0.01)
    use = watching.take()
    assert use is not None
    assert use.kv_cache_peaks == (0.5, 0.0)
    assert use.busy_seconds[0] >= 0.01
    assert use.busy_seconds[1] == 0.0
    assert (use.num_responses, use.preemptions, use.queued_seconds) == (4, 8, 2.0)
    one.say(responses=7)
    other.say(responses=4)
    assert watching.take() == EngineUse(
        kv_cache_peaks=(0.0, 0.0),
        busy_seconds=(0.0, 0.0),
        preemptions=2,
        queued_seconds=0.5,
        num_responses=1,
    )


def test_the_first_look_is_at_the_start(servers: tuple[Server, Server, ServerWatch]) -> None:
    """A first rollout may be over before the thread's first look."""
    one, _, watching = servers
    one.say(responses=7)
    use = watching.take()
    assert use is not None
    assert use.num_responses == 4


def test_a_server_that_is_down_and_starts_again(
    servers: tuple[Server, Server, ServerWatch],
) -> None:
    one, _, watching = servers
    watching.take()
    one.text = None
    assert watching.take() is None
    one.say(responses=2)
    use = watching.take()
    assert use is not None
    assert use.num_responses == 2


def test_a_server_without_metrics_is_said_once(
    servers: tuple[Server, Server, ServerWatch], caplog: pytest.LogCaptureFixture
) -> None:
    one, _, watching = servers
    one.text = "vllm:something_else 1\n"
    with caplog.at_level(logging.WARNING):
        watching.take()
        watching.take()
    (record,) = caplog.records
    assert "http://a:1 has no metrics" in record.getMessage()


def test_the_thread_looks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SECONDS_BETWEEN_LOOKS", 0.001)
    server: Any = Server()
    watching = ServerWatch([server])
    server.say(cache=0.75, running=1, responses=3)
    end = time.monotonic() + 60
    while not (seen := watching.take()) or seen.kv_cache_peaks != (0.75,):
        assert time.monotonic() < end
        time.sleep(0.01)
    watching.close()
