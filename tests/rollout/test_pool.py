"""Engines that fail again and again, on a world of one; tests/training has those of several."""

import re
import time
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
from torch import Tensor, tensor

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout import pool
from megatron_oprd.rollout.engine import (
    EngineUse,
    Progress,
    Rollout,
    RolloutEngineError,
    SamplingParams,
    WrongWeightsError,
)
from megatron_oprd.rollout.pool import EnginePool, EngineWork
from megatron_oprd.rollout.recovery import EngineStarter

SAMPLING = SamplingParams(max_new_tokens=1, seed=0)


class Script:
    """Engines that do what the script says next: "ok", or the error that they fail with."""

    def __init__(self, *script: str | RolloutEngineError) -> None:
        self.calls: list[str] = []
        self.lacks_weights = True
        self._script = list(script)

    def _next(self, call: str) -> None:
        self.calls.append(call)
        what = self._script.pop(0)
        if isinstance(what, RolloutEngineError):
            raise what

    def create(self) -> "Script":
        self._next("create")
        return self

    def needs_all_weights(self) -> bool:
        return self.lacks_weights

    def load_weights(
        self,
        stream: Iterable[tuple[str, Tensor]],
        *,
        version: int = 0,
        left_out: Collection[str] = (),
    ) -> None:
        names = [name for name, _ in stream]
        assert {*names, *left_out} == {"frozen", "b"}
        self._next(f"load {version}" if "frozen" in names else f"load {version} in part")
        self.lacks_weights = False

    def generate(self, prompts: Any, sampling: SamplingParams) -> list[Rollout]:
        self._next("generate")
        return []

    def start(self, prompts: Any, sampling: SamplingParams) -> None:
        self._next("start")

    def finish(self) -> list[Rollout]:
        self._next("finish")
        return []

    def sleep(self) -> None:
        self._next("sleep")

    def close(self) -> None:
        self.calls.append("close")
        self.lacks_weights = True


def stream(*, trainable_only: bool, wanted: bool) -> Iterator[tuple[str, Tensor | None]]:
    assert wanted
    if not trainable_only:
        yield "frozen", tensor(1.0)
    yield "b", tensor([1.0, 2.0])


def engines(script: Script, context: Any, max_restarts: int = 2) -> EnginePool:
    return EnginePool(
        EngineStarter(owners=[0], create=script.create, max_restarts=max_restarts),
        stream,
        frozen={"frozen"},
        context=context,
    )


LOST = RolloutEngineError("lost")


def test_everything_is_repeated(context: Any) -> None:
    script = Script("ok", LOST, LOST, "ok", "ok", LOST, "ok", "ok", "ok", LOST, "ok", "ok", "ok")
    them = engines(script, context, max_restarts=9)
    them.sync(version=4)
    assert them.generate([Prompt(index=0, token_ids=(1,))], SAMPLING) == []
    them.sleep()
    assert script.calls == [
        *("create", "load 4", "close", "create", "create", "load 4"),
        *("generate", "close", "create", "load 4", "generate"),
        *("sleep", "close", "create", "load 4", "sleep"),
    ]
    assert them.take_restarts() == 4
    assert them.take_restarts() == 0


def test_what_is_frozen_is_sent_to_engines_that_lack_it(context: Any) -> None:
    again: list[str | RolloutEngineError] = [LOST, "ok", "ok", "ok", "ok"]
    script = Script("ok", "ok", "ok", *again, "ok")
    them = engines(script, context)
    assert [them.sync(version=version) for version in range(4)] == [12, 8, 20, 8]
    script.lacks_weights = True
    assert them.sync(version=4) == 12
    assert script.calls == [
        *("create", "load 0", "load 1 in part"),
        *("load 2 in part", "close", "create", "load 2", "load 3 in part", "load 4"),
    ]


def test_an_engine_that_does_not_say_what_it_lacks(context: Any) -> None:
    class Silent(Script):
        def needs_all_weights(self) -> bool:
            raise LOST

    script = Silent("ok", "ok", "ok")
    them = engines(script, context)
    them.sync()
    them.sync()
    assert script.calls == ["create", "load 0", "load 0"]


def test_what_was_begun_is_repeated_with_the_weights_that_there_are(context: Any) -> None:
    """An engine that is lost has nothing under way when it is back; the student is further."""
    made: list[Script] = []

    def create() -> Script:
        made.append(Script(*scripts.pop(0)))
        return made[-1]

    scripts: list[list[Any]] = [["ok", LOST], ["ok", "ok", LOST], ["ok", "ok"]]
    them = EnginePool(
        EngineStarter(owners=[0], create=create, max_restarts=2), stream, context=context
    )
    them.sync(version=4)
    them.start([], SAMPLING)
    assert them.finish(version=5) == []
    assert [one.calls for one in made] == [
        ["load 4", "start", "close"],
        ["load 4", "start", "finish", "close"],
        ["load 5", "generate"],
    ]


def test_work_of_each_engine(context: Any) -> None:
    them = engines(Script("ok", "ok", "ok"), context)
    them.sync()
    them.generate([], SAMPLING)
    (work,) = them.take_work()
    assert work.tokens == 0
    assert work.seconds > 0
    assert work.window >= work.seconds
    (nothing,) = them.take_work()
    assert (nothing.tokens, nothing.seconds, nothing.use) == (0, 0.0, None)


def test_work_in_the_background(context: Any) -> None:
    """Its tokens count; its time is the engine's to say."""

    class Writing(Script):
        def finish(self) -> list[Rollout]:
            rollout = Rollout(
                prompt_index=0,
                sample_index=0,
                prompt_ids=(1,),
                response_ids=(2, 3),
                finished=True,
            )
            return [rollout, rollout]

    them = engines(Writing("ok", "ok"), context)
    them.start([], SAMPLING)
    them.finish(version=0)
    (work,) = them.take_work()
    assert (work.tokens, work.seconds) == (4, 0.0)
    assert work.window > 0


def test_work_of_two_times() -> None:
    use = EngineUse(
        kv_cache_peaks=(0.5,),
        busy_seconds=(1.0,),
        preemptions=1,
        queued_seconds=0.0,
        num_responses=1,
    )
    one = EngineWork(tokens=2, seconds=0.5, window=3.0)
    other = EngineWork(tokens=1, seconds=1.0, window=2.0, use=use)
    assert one + other == EngineWork(tokens=3, seconds=1.5, window=5.0, use=use)
    assert other + one == one + other
    assert (other + other).use == use + use


def test_use_of_an_engine_that_measures_it(context: Any) -> None:
    one, other = (
        EngineUse(
            kv_cache_peaks=(peak, 0.125),
            busy_seconds=(1.0, peak),
            preemptions=count,
            queued_seconds=0.5,
            num_responses=count,
        )
        for peak, count in ((0.5, 2), (0.25, 3))
    )
    both = one + other
    assert (both.kv_cache_peaks, both.preemptions) == ((0.5, 0.125), 5)
    assert both.busy_seconds == (2.0, 0.75)
    assert (both.queued_seconds, both.num_responses) == (1.0, 5)

    class Measuring(Script):
        def take_use(self) -> EngineUse | None:
            return both

    them = engines(Measuring("ok", "ok"), context)
    them.generate([], SAMPLING)
    assert [work.use for work in them.take_work()] == [both]


def test_signs_of_life(
    context: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many of the responses there are, and how fast their tokens came."""
    monkeypatch.setattr(pool, "heartbeat", partial(pool.heartbeat, first_seconds=0.05))

    class Slow(Script):
        def _work(self) -> list[Rollout]:
            time.sleep(0.2)
            rollout = Rollout(
                prompt_index=0,
                sample_index=0,
                prompt_ids=(1,),
                response_ids=(2,) * 1000,
                finished=True,
            )
            return [rollout] * 3

        def generate(self, prompts: Any, sampling: SamplingParams) -> list[Rollout]:
            return self._work()

        def finish(self) -> list[Rollout]:
            return self._work()

        def progress(self) -> Progress:
            return Progress(responses=1, tokens=1300)

    them = engines(Slow("ok", "ok"), context)
    prompts = [Prompt(index=index, token_ids=(1,)) for index in range(3)]
    them.generate(prompts, SAMPLING)
    first, *_, last = capsys.readouterr().err.splitlines()
    found = re.fullmatch(
        r"rollouts, 3 responses of this rank's engine: 1 of 3, (\S+) tokens/s, (\S+) s so far",
        first,
    )
    assert found is not None
    assert float(found[1].replace(",", "")) * float(found[2]) == pytest.approx(1300, rel=0.05)
    found = re.search(r": ended after (\S+) s, (\S+) tokens/s$", last)
    assert found is not None
    assert float(found[1]) * float(found[2].replace(",", "")) == pytest.approx(3000, rel=0.05)
    them.start(prompts, SAMPLING)
    them.finish(version=0)
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("waiting for rollouts that were begun before: 1 of 3, ")


def test_the_limit_is_of_one_step(context: Any) -> None:
    again: list[str | RolloutEngineError] = [LOST, "ok", "ok"] * 2
    them = engines(Script("ok", "ok", *again, "ok", *again, LOST), context)
    them.sync()
    them.generate([], SAMPLING)
    assert them.take_restarts() == 2
    with pytest.raises(RolloutEngineError, match=r"2 restarts in this step, .* = 2\): lost"):
        them.generate([], SAMPLING)


def test_no_start(context: Any) -> None:
    with pytest.raises(RolloutEngineError, match="engine 0, of rank 0, did not start: lost"):
        engines(Script(LOST), context)


def test_wrong_weights_are_not_repeated(context: Any) -> None:
    them = engines(Script("ok", WrongWeightsError("wrong")), context)
    with pytest.raises(RolloutEngineError, match=r"not started again \(0 restarts .*wrong"):
        them.sync()
