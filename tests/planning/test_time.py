"""Seconds of messages and of tokens: formulas written out, and published measurements."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_oprd.config.schema import RolloutConfig, RunConfig
from megatron_oprd.planning.activations import KERNELS
from megatron_oprd.planning.communication import sent_bytes
from megatron_oprd.planning.estimate import estimate_memory, read_models
from megatron_oprd.planning.hardware import Group, Hardware
from megatron_oprd.planning.time import StepSeconds, step_seconds
from megatron_oprd.rollout.registry import ENGINES

H100 = Hardware()
A100_GB_PER_S = 2039.0
# Tokens per second of one response (Qwen2.5's speed benchmark, bf16, A100, input of one token):
# billions of parameters, layers, with transformers, with vLLM.
QWEN = {
    "0.5B": (0.494, 24, 47.40, 311.55),
    "1.5B": (1.54, 28, 39.68, 183.33),
    "7B": (7.62, 28, 40.38, 84.28),
}


def seconds_with(
    qwen: Callable[..., RunConfig], num_gpus: int, *overrides: str, hardware: Hardware = H100
) -> StepSeconds:
    config = qwen(*overrides)
    kernel = KERNELS["transformer_engine"]
    found = estimate_memory(config, read_models(config), kernel, num_gpus=num_gpus, memory_gb=80)
    return step_seconds(found.layouts, found.largest, hardware)


@pytest.mark.parametrize(
    ("size", "stride", "bandwidth"),
    [
        (8, 1, 370),
        # Two nodes with eight cards each, and what their NVLink could do.
        (16, 1, min(370, 8 * 46)),
        # Replicas of tensor parallelism 4: two of a node, whose cards are theirs.
        (16, 4, 2 * 46),
        (2, 8, 46),
        (1, 8, 370),
    ],
)
def test_a_ring_is_as_fast_as_its_slowest_link(size: int, stride: int, bandwidth: float) -> None:
    found = H100.seconds_of_ring(1e9, Group(size=size, stride=stride))
    assert found == pytest.approx(1 / bandwidth)


def test_tokens_to_experts_leave_the_node_over_its_cards() -> None:
    """Of 16 ranks on two nodes each sends 8 of its 15 parts to the other node."""
    assert H100.seconds_of_all_to_all(1e9, Group(size=8, stride=1)) == pytest.approx(1 / 370)
    found = H100.seconds_of_all_to_all(15e9, Group(size=16, stride=1))
    assert found == pytest.approx(8 / 46)


def test_phases_are_bytes_over_bandwidths(qwen: Callable[..., RunConfig]) -> None:
    """TP 4 x PP 2 x DP 2 on two nodes: pipeline and replicas go over the network."""
    sizes = "parallel.pipeline_model_parallel_size=2"
    found = seconds_with(qwen, 16, sizes)
    config = qwen(sizes)
    estimate = estimate_memory(
        config, read_models(config), KERNELS["local"], num_gpus=16, memory_gb=80
    )
    sent = [sent_bytes(estimate.layout, estimate.largest, pp_rank=rank) for rank in (0, 1)]
    assert {one.student_tp / 370e9 for one in sent} >= {found.student.tensor}
    assert {one.student_pp / 46e9 for one in sent} >= {found.student.pipeline}
    # Replicas are 4 ranks apart: both on one node of 8.
    assert found.gradients == pytest.approx(max(one.gradients for one in sent) / 370e9)
    small = seconds_with(qwen, 16, sizes, hardware=replace(H100, gpus_per_node=4))
    assert small.gradients == pytest.approx(max(one.gradients for one in sent) / 46e9)
    assert small.student.tensor == found.student.tensor


def test_overlapped_gradients_are_hidden(qwen: Callable[..., RunConfig]) -> None:
    assert seconds_with(qwen, 64).gradients > 0
    assert seconds_with(qwen, 64, "optimizer.overlap_grad_reduce=true").gradients == 0


def test_offload_costs_copies(qwen: Callable[..., RunConfig]) -> None:
    """States go both ways; the teacher comes while it computes, unless the link is slow."""
    assert seconds_with(qwen, 8).copies == 0
    assert seconds_with(qwen, 8, "teacher.offload=cpu").copies == 0
    slow = replace(H100, host_bandwidth=0.5)
    assert seconds_with(qwen, 8, "teacher.offload=cpu", hardware=slow).copies > 0
    assert seconds_with(qwen, 8, "optimizer.offload_states=true").copies > 0.1
    # An engine's weights, on the way to the host's memory and back; not while it generates.
    engine = ["rollout.engine=vllm", "rollout.vllm.sleep_level=1"]
    assert seconds_with(qwen, 8, *engine).copies == pytest.approx(2 * 4.02e9 * 2 / 55e9, rel=0.01)
    assert seconds_with(qwen, 8, *engine, "rollout.max_staleness=1").copies == 0


def test_rollouts_beside_training(qwen: Callable[..., RunConfig]) -> None:
    """The longer of both counts with an engine that overlaps; `hf` generates in turns as before."""
    vllm = ["rollout.engine=vllm", "rollout.vllm.gpu_memory_utilization=0.25"]
    for overrides in (vllm, [*vllm, "rollout.samples_per_prompt=1"]):
        after = seconds_with(qwen, 64, *overrides)
        beside = seconds_with(qwen, 64, *overrides, "rollout.max_staleness=1")
        training = after.total - after.rollout - after.sync
        assert beside.total == pytest.approx(max(after.rollout, training) + after.sync)
        assert beside.total < 0.95 * after.total
    before = seconds_with(qwen, 64).total
    assert seconds_with(qwen, 64, "rollout.max_staleness=1").total == pytest.approx(before)


@pytest.mark.parametrize("model", QWEN)
def test_tokens_as_published(model: str) -> None:
    """vLLM within 15%, transformers within 15% of launches measured on another machine."""
    billions, layers, transformers, vllm = QWEN[model]
    working = billions * 2 / A100_GB_PER_S
    for name, published in (("hf", transformers), ("vllm", vllm)):
        found = ENGINES[name].seconds_of_token(
            RolloutConfig(), num_layers=layers, working=working, message_bytes=0
        )
        assert found == pytest.approx(1 / published, rel=0.15), name


def test_all_reduces_of_an_engine() -> None:
    """Two a layer, as long as published for small and for large messages."""

    def seconds(num_gpus: int, message_bytes: int) -> float:
        rollout = RolloutConfig(engine="vllm")
        rollout.vllm.tensor_model_parallel_size = num_gpus
        return ENGINES["vllm"].seconds_of_token(
            rollout, num_layers=36, working=0.002, message_bytes=message_bytes
        )

    for num_gpus, message_bytes, microseconds in ((2, 4096, 8.8), (8, 4096, 9.3), (8, 2**19, 30.4)):
        more = seconds(num_gpus, message_bytes) - seconds(1, message_bytes)
        assert more == pytest.approx(36 * 2 * microseconds * 1e-6)
