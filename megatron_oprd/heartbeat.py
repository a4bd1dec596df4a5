"""Says that long work still goes on."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_oprd.errors import say, speaks

_FIRST_SECONDS = 30.0
_MOST_SECONDS = 300.0


@contextmanager
def heartbeat(
    work: str,
    so_far: Callable[[float], str] = lambda seconds: "",
    *,
    at_end: Callable[[float], str] = lambda seconds: "",
    first_seconds: float = _FIRST_SECONDS,
) -> Iterator[None]:
    """Says on rank 0, while the block runs, for how long it has.

    The first line comes after ``first_seconds``, later ones at twice the distance each, up to five
    minutes. Shorter work leaves no line.

    Args:
        work: What the block does, as the line begins.
        so_far: Given the seconds until then, how much of it is done; empty where that is not
            known. Called from another thread.
        at_end: The same when it has come to its end.
        first_seconds: Time without a line.
    """
    if not speaks():
        yield
        return
    started, ended = time.monotonic(), threading.Event()

    def beat() -> None:
        distance = first_seconds
        while not ended.wait(distance):
            seconds = time.monotonic() - started
            say(f"{work}: {_joined(so_far(seconds), f'{seconds:.3g} s so far')}")
            distance = min(2 * distance, _MOST_SECONDS)

    # A daemon: an exception on its way out of the process does not wait for it.
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if (seconds := time.monotonic() - started) >= first_seconds:
            say(f"{work}: {_joined(f'ended after {seconds:.3g} s', at_end(seconds))}")


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
