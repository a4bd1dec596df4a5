"""Recommended layouts: the full enumeration's, and such that a run takes."""

import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_oprd import plan
from megatron_oprd.config.load import load_config
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.errors import UserError
from megatron_oprd.planning import recommend as recommend_module
from megatron_oprd.planning.activations import KERNELS
from megatron_oprd.planning.changes import Change
from megatron_oprd.planning.estimate import estimate_memory, read_models
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.ranking import Candidate, ranked
from megatron_oprd.planning.recommend import Lengths, recommend
from megatron_oprd.planning.recommended import bound_by, layout_name, loses
from megatron_oprd.planning.time import PassSeconds, StepSeconds, step_seconds
from megatron_oprd.planning.workload import workload
from megatron_oprd.training.plan import make_plan
from tests.helpers.pairs import save_pair
from tests.planning.models import EXAMPLES, model_folder

pytestmark = pytest.mark.long

KERNEL = KERNELS["transformer_engine"]
LENGTHS = Lengths(prompt=512, response=2048)
# Two GPUs a node, so that some groups cross nodes, and little memory, so that much does not fit.
SMALL = Hardware(memory_gb=38, gpus_per_node=2)
ENGINE = ["rollout.engine=vllm", "rollout.max_batch_size=null"]


def found_for(config: RunConfig, hardware: Hardware, num_gpus: int) -> list[Candidate]:
    return recommend(
        config, read_models(config), KERNEL, hardware, num_gpus=num_gpus, lengths=LENGTHS
    )


def enumerated(
    load: Callable[..., RunConfig], hardware: Hardware, num_gpus: int, *overrides: str
) -> list[float]:
    """Seconds of the layouts that fit, in order, each with its first settings of all.

    From overrides alone. A step counts 2% longer for recompute, and for each offload, and 2% of
    what is hidden. Within 2%, a layout of at most 90% of the memory comes first, if it has no more
    of these settings.
    """
    sizes = [
        (tp, pp, 1)
        for tp, pp in itertools.product((1, 2), (1, 2, 3, 4))
        if num_gpus % (tp * pp) == 0
    ]
    recompute = (
        ["recompute.recompute_granularity=null"],
        ["recompute.recompute_granularity=selective"],
        [
            "recompute.recompute_granularity=full", "recompute.recompute_method=uniform",
            "recompute.recompute_num_layers=1",
        ],
    )  # fmt: skip
    plain = "recompute={recompute_granularity: null, recompute_method: null, "
    plain += "recompute_num_layers: null}"
    left: list[tuple[tuple[int, int, int], float, int, float, int]] = []
    for size, again, teacher, states, engine, share in itertools.product(
        sizes, recompute, ("none", "cpu"), ("false", "true"), (1, 2), (0.25, 0.4, 0.55, 0.7)
    ):
        tp, pp, _ = size
        try:
            config = load(
                *ENGINE,
                *overrides,
                plain,
                *again,
                f"parallel.tensor_model_parallel_size={tp}",
                f"parallel.sequence_parallel={str(tp > 1).lower()}",
                f"parallel.pipeline_model_parallel_size={pp}",
                f"teacher.offload={teacher}",
                f"optimizer.offload_states={states}",
                f"rollout.vllm.tensor_model_parallel_size={engine}",
                f"rollout.vllm.gpu_memory_utilization={share}",
            )
            memory = estimate_memory(
                config, read_models(config), KERNEL, num_gpus=num_gpus,
                memory_gb=hardware.memory_gb,
            )  # fmt: skip
        except UserError:
            continue
        if memory.fits(hardware):
            typical = workload(memory.layout, prompt_tokens=512, response_tokens=2048)
            of_step = step_seconds(memory.layouts, typical, hardware)
            seconds = of_step.total
            beside = min(of_step.rollout, of_step.training) if of_step.overlaps else 0
            more = (again is not recompute[0]) + (teacher == "cpu") + (states == "true")
            peak = max(rank.peak_bytes for rank in memory.ranks)
            left.append((size, (seconds + 0.02 * beside) * 1.02**more, peak, seconds, more))
    ordered = []
    while left:
        _, quickest, _, _, most_more = min(left, key=lambda one: (one[1], one[4]))
        close = [one for one in left if one[1] < 1.02 * quickest and one[4] <= most_more]
        most = max(min(one[2] for one in close), 0.9 * hardware.memory_gb * 1e9)
        first = min((one for one in close if one[2] <= most), key=lambda one: one[1:3])
        ordered.append(first[3])
        left = [one for one in left if one[0] != first[0]]
    return ordered


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["rollout.max_staleness=1"]], ids=["in-turn", "beside"])
def test_the_ranking_is_the_full_enumerations(
    qwen: Callable[..., RunConfig], overrides: list[str]
) -> None:
    hardware = SMALL if not overrides else replace(SMALL, memory_gb=60)
    found = found_for(qwen(*ENGINE, *overrides), hardware, 4)
    expected = enumerated(qwen, hardware, 4, *overrides)
    assert [one.seconds.total for one in found] == pytest.approx(expected[:5])
    assert len(expected) > 1


def test_settings_give_what_the_table_says(qwen: Callable[..., RunConfig]) -> None:
    """Pasted behind the same configuration, they make the run that was ranked."""
    hardware = Hardware()
    found = found_for(qwen(*ENGINE), hardware, 8)
    assert len(found) == 5
    assert len({layout_name(one) for one in found}) == 5
    for one in found:
        config = qwen(*ENGINE, *shlex.split(str(one.change)))
        again = estimate_memory(config, read_models(config), KERNEL, num_gpus=8, memory_gb=80)
        assert again.ranks == one.memory.ranks
        assert again.fits(hardware)
        typical = workload(again.layout, prompt_tokens=512, response_tokens=2048)
        assert step_seconds(again.layouts, typical, hardware) == one.seconds
        assert bound_by(one.seconds).endswith("%")
    slower = replace(found[0].seconds, decode=found[0].seconds.decode + 5)
    assert loses(slower, found[0].seconds) == "5.0 s: rollout +5.0 s"
    assert loses(found[0].seconds, slower) == "nothing: 5.0 s faster"


def test_what_only_saves_memory_has_to_gain_2_percent(qwen: Callable[..., RunConfig]) -> None:
    plain = "recompute={recompute_granularity: null, recompute_method: null, "
    plain += "recompute_num_layers: null}"
    seconds = in_all(100)
    more = ["teacher.offload=cpu", "optimizer.offload_states=true"]
    more.append("recompute.recompute_granularity=selective")
    for overrides, counted in (
        ([], 100),
        *(([one], 102) for one in more),
        (more, 100 * 1.02**3),
    ):
        config = qwen(*ENGINE, plain, *overrides)
        memory = estimate_memory(config, read_models(config), KERNEL, num_gpus=8, memory_gb=80)
        found = Candidate(change=Change(()), memory=memory, seconds=seconds)
        assert found.rank_seconds == pytest.approx(counted), overrides


def test_within_2_percent_a_layout_with_room_comes_first(
    qwen: Callable[..., RunConfig],
) -> None:
    """Of engines with more and more of the GPU, and less and less time."""

    def with_share(share: float, seconds: float, *overrides: str) -> Candidate:
        name = f"rollout.vllm.gpu_memory_utilization={share}"
        config = qwen(*ENGINE, name, *overrides)
        memory = estimate_memory(config, read_models(config), KERNEL, num_gpus=8, memory_gb=80)
        return Candidate(change=Change(()), memory=memory, seconds=in_all(seconds))

    far, roomy, near, tight, full = (
        with_share(share, seconds)
        for share, seconds in ((0.4, 102.5), (0.5, 101.9), (0.6, 101.5), (0.7, 100.5), (0.73, 100))
    )
    peaks = [one.peak_bytes / 80e9 for one in (far, roomy, near, tight, full)]
    assert peaks == sorted(peaks)
    assert peaks[2] < 0.9 < peaks[3]
    sizes = [Change((("parallel.tensor_model_parallel_size", size),)) for size in (1, 2, 4, 8)]
    every = dict(zip(sizes, ([full], [far], [tight], [near, roomy]), strict=True))
    # Of near and roomy, which both have room, the faster one. Nothing else that has room is left
    # within 2% then: the one with most memory left.
    assert ranked(every, Hardware(), 4) == [near, tight, full, far]
    # As fast: more memory left.
    same = replace(roomy, seconds=near.seconds)
    assert ranked({sizes[0]: [near, same]}, Hardware(), 1) == [same]
    # Room that is bought with an offload is no reason: an offload has to gain 2%.
    bought = with_share(0.6, 99.5, "optimizer.offload_states=true")
    assert bought.peak_bytes < near.peak_bytes
    assert ranked({sizes[0]: [bought], sizes[1]: [full]}, Hardware(), 1) == [full]
    assert ranked({sizes[0]: [bought], sizes[1]: [far]}, Hardware(), 1) == [bought]


def in_all(seconds: float) -> StepSeconds:
    """A step that takes no time but for decoding."""
    nothing = PassSeconds()
    return StepSeconds(
        prefill=0,
        decode=seconds,
        teacher=nothing,
        student=nothing,
        gradients=0,
        optimizer=0,
        parameters=0,
        copies=0,
        sync=0,
    )


def test_what_a_longer_phase_hides_is_not_named() -> None:
    short = StepSeconds(
        prefill=0,
        decode=9,
        teacher=PassSeconds(compute=3),
        student=PassSeconds(compute=4, tensor=3),
        gradients=0,
        optimizer=0,
        parameters=0,
        copies=0,
        sync=1,
        overlaps=True,
    )
    assert short.total == 11
    assert bound_by(short) == "FLOPs 64%"
    assert bound_by(replace(short, overlaps=False)) == "decoding 45%"
    long = replace(short, decode=15)
    assert bound_by(long) == "decoding 94%"
    assert loses(long, short) == "5.0 s: rollout +6.0 s"


def test_a_run_takes_every_recommended_layout(tmp_path: Path) -> None:
    """The checks of a dry run, with a mixture of experts as the teacher."""
    pair = save_pair(tmp_path / "pair", "qwen3_moe", teacher_family="qwen3_moe", teacher_layers=6)
    for gpus_per_node, num_gpus in ((2, 4), (8, 8)):
        config = load_config(pair / "run.yaml", ["rollout.prompts_per_step=8"])
        hardware = Hardware(gpus_per_node=gpus_per_node)
        lengths = Lengths(
            prompt=config.data.max_prompt_tokens, response=config.rollout.max_new_tokens
        )
        found = recommend(
            config, read_models(config), KERNEL, hardware, num_gpus=num_gpus, lengths=lengths
        )
        assert found
        for one in found:
            overrides = ["rollout.prompts_per_step=8", *shlex.split(str(one.change))]
            make_plan(load_config(pair / "run.yaml", overrides), world_size=num_gpus)


@pytest.mark.slow
def test_sequences_are_shared_only_if_nothing_fits_otherwise(
    qwen: Callable[..., RunConfig],
) -> None:
    servers = ["rollout.engine=vllm", "rollout.vllm.servers=[http://127.0.0.1:8000]"]
    long = [*servers, "data.max_prompt_tokens=1024", "rollout.max_new_tokens=30000"]
    config = qwen(*long, "rollout.max_batch_size=null")
    sizes = []
    for memory_gb in (80, 20, 10, 5):
        found = found_for(config, Hardware(memory_gb=memory_gb), 16)
        sizes.append({one.memory.layout.config.parallel.context_parallel_size for one in found})
    assert sizes[0] == {1}
    assert all(len(one) <= 1 for one in sizes)


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbered rows, the last off-policy, and each one's settings in one line."""
    arguments = [
        "--config", str(EXAMPLES / "qwen3_32b_to_4b.yaml"), "--gpus", "8", "--recommend",
        f"model.student={model_folder(tmp_path, 'Qwen3-4B')}",
        f"model.teacher={model_folder(tmp_path, 'Qwen3-32B')}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(recommend_module, "_SILENT_SECONDS", 0.01)
    assert plan.main() == 0
    shown, said = capsys.readouterr()
    assert re.search(r"^ranking the layouts of 8 GPUs: \d+ of \d+ layouts timed, ", said)
    assert "settings, of" in said
    lines = [line for line in shown.splitlines() if re.match(r"\d: ", line)]
    assert [line[0] for line in lines] == [*"1234567"]
    assert "Layouts of 8 GPUs" in shown
    assert shown.count("off-policy by 1 update") == 2
    assert "ranking the layouts of 8 GPUs, off-policy by 1 update: " in said
    assert [line[3:].startswith("rollout.max_staleness=1 ") for line in lines] == [
        *[False] * 5,
        *[True] * 2,
    ]
    file = tmp_path / "plan.json"
    monkeypatch.setattr(
        sys, "argv",
        ["plan", *arguments[:4], *arguments[5:], "--json", str(file), *lines[0][3:].split()],
    )  # fmt: skip
    assert plan.main() == 0
    assert json.loads(file.read_text())["fits"]
