"""Layouts of the other policy beside those of a run's settings."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.console import make_console
from megatron_oprd.planning.activations import KERNELS
from megatron_oprd.planning.estimate import estimate_memory, read_models
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.ranking import Candidate
from megatron_oprd.planning.recommend import Lengths, recommend
from megatron_oprd.planning.recommended import layout_name, print_recommended
from megatron_oprd.planning.staleness import OtherPolicy, other_policy
from megatron_oprd.planning.time import step_seconds
from megatron_oprd.planning.workload import workload

pytestmark = pytest.mark.long

KERNEL = KERNELS["transformer_engine"]
ENGINE = ["rollout.engine=vllm", "rollout.max_batch_size=null"]


LENGTHS = Lengths(prompt=512, response=2048)


def both(config: RunConfig, *, memory_gb: float = 80) -> tuple[list[Candidate], OtherPolicy | None]:
    """The first layout of the settings, and the other policy's, on a node of two GPUs."""
    hardware, models = Hardware(memory_gb=memory_gb, gpus_per_node=2), read_models(config)
    found = recommend(config, models, KERNEL, hardware, num_gpus=2, lengths=LENGTHS, number=1)
    return found, beside(config, found, memory_gb=memory_gb)


def beside(
    config: RunConfig, found: list[Candidate], *, memory_gb: float = 80
) -> OtherPolicy | None:
    hardware, models = Hardware(memory_gb=memory_gb, gpus_per_node=2), read_models(config)
    return other_policy(config, models, KERNEL, hardware, found, num_gpus=2, lengths=LENGTHS)


def shown(
    found: Sequence[Candidate], other: OtherPolicy, capsys: pytest.CaptureFixture[str]
) -> str:
    hardware = Hardware(gpus_per_node=2)
    console = make_console(highlight=False)
    print_recommended(console, list(found), other, hardware, num_gpus=2)
    return capsys.readouterr().out


def test_off_policy_holds_trainer_and_engine_and_takes_the_longer(
    qwen: Callable[..., RunConfig],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the settings of its line, a run has the memory and the time of its row."""
    monkeypatch.setenv("COLUMNS", "300")
    found, other = both(qwen(*ENGINE))
    assert other is not None
    assert other.found
    for one in other.found:
        config = qwen(*ENGINE, *shlex.split(str(one.change)))
        assert config.rollout.max_staleness == 1
        memory = estimate_memory(config, read_models(config), KERNEL, num_gpus=2, memory_gb=80)
        assert memory.ranks == one.memory.ranks
        engine = memory.engine
        assert engine is not None
        for rank in memory.ranks:
            for items in rank.phases.values():
                assert items["KV cache"] == engine.kv_cache
                assert items["rollout engine's weights"] == engine.weights
        typical = workload(memory.layout, prompt_tokens=512, response_tokens=2048)
        hardware = Hardware(gpus_per_node=2)
        seconds = step_seconds(memory.layouts, typical, hardware)
        assert seconds == one.seconds
        longer = max(seconds.rollout, seconds.training)
        assert seconds.total == pytest.approx(longer + seconds.sync)
        assert seconds.total * 1.02 < found[0].seconds.total
        assert layout_name(one).endswith("off-policy by 1 update")
    assert "off-policy" not in layout_name(found[0])
    text = shown(found, other, capsys)
    assert "\n2: rollout.max_staleness=1 " in text
    before, after = text.split("off-policy by 1 update", maxsplit=1)
    assert before.count("├") == 1, "a line above the other policy"
    assert "faster" in after


def test_it_has_to_gain_2_percent(qwen: Callable[..., RunConfig]) -> None:
    """Against a first layout that is made as fast."""
    config = qwen(*ENGINE)
    (first,), other = both(config)
    assert other is not None
    best = other.found[0]
    for gain, pays in ((1.019, False), (1.021, True)):
        more = (gain * best.rank_seconds - first.rank_seconds) / 1.02**first.num_savers
        seconds = replace(first.seconds, decode=first.seconds.decode + more)
        against = beside(config, [replace(first, seconds=seconds)])
        assert against is not None
        assert (best.change in [one.change for one in against.found]) == pays


def test_without_memory_for_both_it_says_so(
    qwen: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """46 GB hold a trainer, and an engine while it sleeps."""
    found, other = both(qwen(*ENGINE), memory_gb=46)
    assert found
    assert other is not None
    assert other.found == []
    assert other.refusal == ""
    assert shown(found, other, capsys).endswith(
        "rollout.max_staleness=1: no layout with it fits and gains 2% of a step\n"
    )


def test_settings_that_do_not_allow_it_are_named(
    qwen: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    found, other = both(qwen(*ENGINE, "rollout.function=tests.helpers.rollout_functions:plain"))
    assert other is not None
    assert other.found == []
    said = shown(found, other, capsys).splitlines()[-1]
    assert said.startswith("rollout.max_staleness=1: not compared, as the settings do not allow it")
    assert "rollout.function" in said


def test_on_policy_is_shown_below_what_is_off_policy(
    qwen: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """However slow it is: who trains off-policy wants to know what that gains."""
    config = qwen(*ENGINE, "rollout.max_staleness=1")
    found, other = both(config)
    assert other is not None
    assert all(one.seconds.overlaps for one in found)
    assert other.found
    for one in other.found:
        assert not one.seconds.overlaps
        assert str(one.change).startswith("rollout.max_staleness=0 ")
    # Where trainer and engine have no room beside each other, it is all that is shown.
    found, other = both(config, memory_gb=46)
    assert found == []
    assert other is not None
    assert "\n1: rollout.max_staleness=0 " in shown(found, other, capsys)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [*ENGINE, "rollout.oversample=0.25"],
        [*ENGINE, "rollout.vllm.servers=[http://127.0.0.1:8000]"],
    ],
    ids=["hf", "oversample", "server"],
)
def test_where_staleness_changes_no_counted_time_nothing_is_compared(
    qwen: Callable[..., RunConfig], overrides: list[str]
) -> None:
    assert both(qwen(*overrides))[1] is None
