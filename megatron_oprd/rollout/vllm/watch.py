"""How full vLLM servers are, from the metrics that they offer to Prometheus (``/metrics``)."""

import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_oprd.rollout.engine import EngineUse, RolloutEngineError
from megatron_oprd.rollout.vllm.server import VLLMServer

logger = logging.getLogger(__name__)

# vLLM's names; prometheus_client adds the endings of counters and histograms.
_CACHE = "vllm:kv_cache_usage_perc"
_RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
_PREEMPTIONS = "vllm:num_preemptions_total"
_QUEUED = "vllm:request_queue_time_seconds_sum"
_RESPONSES = "vllm:request_queue_time_seconds_count"
_NAMES = (_CACHE, _RUNNING, _WAITING, _PREEMPTIONS, _QUEUED, _RESPONSES)
_COUNTERS = (_PREEMPTIONS, _QUEUED, _RESPONSES)
_SAMPLE = re.compile(r"^([\w:]+)(?:\{.*\})? (\S+)", re.MULTILINE)

# A look costs the server's front end the text of all its metrics.
SECONDS_BETWEEN_LOOKS = 1.0


def samples_of(text: str) -> dict[str, float]:
    """The metrics that are looked at; empty unless all are there.

    A server with several engines has a line for each: caches are the fullest one's, others sums.
    """
    found: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        if name in _NAMES:
            one, before = float(value), found.get(name, 0.0)
            found[name] = max(before, one) if name == _CACHE else before + one
    return found if len(found) == len(_NAMES) else {}


@dataclass(kw_only=True)
class _Of:
    """What was seen of one server since the last `ServerWatch.take`."""

    counters: Mapping[str, float] | None = None  # at the newest look; None before the first
    looked: float = 0.0  # when that was
    is_silent: bool = False  # has said that it has no metrics
    peak: float = 0.0
    busy: float = 0.0
    added: dict[str, float]  # to each counter


class ServerWatch:
    """Looks at servers again and again, in a thread of its own."""

    def __init__(self, servers: Sequence[VLLMServer]) -> None:
        self._servers = {server: _Of(added=dict.fromkeys(_COUNTERS, 0.0)) for server in servers}
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._look()  # what the counters begin at
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def take(self) -> EngineUse | None:
        """The servers' use since the last call; None if they generated nothing."""
        self._look()
        with self._lock:
            seen = list(self._servers.values())
            use = EngineUse(
                kv_cache_peaks=tuple(of.peak for of in seen),
                busy_seconds=tuple(of.busy for of in seen),
                preemptions=round(sum(of.added[_PREEMPTIONS] for of in seen)),
                queued_seconds=sum(of.added[_QUEUED] for of in seen),
                num_responses=round(sum(of.added[_RESPONSES] for of in seen)),
            )
            for of in seen:
                of.peak = of.busy = 0.0
                of.added = dict.fromkeys(_COUNTERS, 0.0)
        return use if use.num_responses or any(use.busy_seconds) else None

    def close(self) -> None:
        """Ends the thread."""
        self._is_over.set()

    def _watch(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_LOOKS):
            self._look()

    def _look(self) -> None:
        for server, of in self._servers.items():
            try:
                text = server.metrics()
            except RolloutEngineError:
                continue  # whether it is left out is for its requests to decide
            with self._lock:
                self._see(server, of, samples_of(text))

    def _see(self, server: VLLMServer, of: _Of, found: Mapping[str, float]) -> None:
        if not found:
            if not of.is_silent:
                of.is_silent = True
                logger.warning(
                    "the vLLM server at %s has no metrics of its cache and its requests; was it "
                    "started with --disable-log-stats?",
                    server.url,
                )
            return
        now = time.monotonic()
        if of.counters is not None:
            of.peak = max(of.peak, found[_CACHE])
            if found[_RUNNING] or found[_WAITING]:
                of.busy += now - of.looked
            for name in _COUNTERS:
                # A server that was started again counts from 0.
                since = of.counters[name] if found[name] >= of.counters[name] else 0.0
                of.added[name] += found[name] - since
        of.counters, of.looked = dict(found), now
