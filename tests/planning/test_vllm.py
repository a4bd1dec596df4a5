"""vLLM engines beside the trainer: formulas written out, for a published model."""

from collections.abc import Callable

import pytest

from megatron_oprd.config.schema import RunConfig
from megatron_oprd.errors import UserError
from megatron_oprd.planning.activations import KERNELS
from megatron_oprd.planning.communication import sent_bytes
from megatron_oprd.planning.estimate import (
    MemoryEstimate,
    check_host_memory,
    estimate_memory,
    read_models,
)
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.ladder import check_fits, nearest_that_fits
from megatron_oprd.planning.memory import PHASES, RankMemory
from megatron_oprd.planning.time import step_seconds
from megatron_oprd.rollout.vllm.memory import CONTEXT_BYTES, check_kv_cache

pytestmark = pytest.mark.long

KERNEL = KERNELS["transformer_engine"]
VLLM = ["rollout.engine=vllm", "rollout.max_batch_size=null"]
# Qwen3-4B: parameters, without the tied head, and bytes of a token's keys and values.
WEIGHTS = 2 * 4_022_468_096
OF_TOKEN = 2 * 36 * 8 * 128 * 2
LENGTH = 1024 + 8192
# 1,024 responses' logits in bf16, in fp32, as log-probabilities, sorted, with their order.
WORKSPACE = 1024 * 151_936 * (2 + 4 + 4 + 4 + 8)
LARGEST = 151_936 * 2560 * 2
ENGINE = ("rollout engine's weights", "KV cache", "rollout engine's workspace")


@pytest.fixture(scope="module")
def qwen(qwen: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    return lambda *overrides: qwen(*VLLM, *overrides)


def gpu(memory_gb: float) -> Hardware:
    return Hardware(memory_gb=memory_gb, tflops=989, bandwidth=3350, mfu=0.4)


def memory(config: RunConfig, num_gpus: int = 8, memory_gb: float = 80) -> MemoryEstimate:
    models = read_models(config)
    return estimate_memory(config, models, KERNEL, num_gpus=num_gpus, memory_gb=memory_gb)


def engine_items(rank: RankMemory, phase: str) -> list[int]:
    return [rank.phases[phase].get(item, 0) for item in ENGINE]  # type: ignore[index,call-overload]


def test_a_share_of_the_device(qwen: Callable[..., RunConfig]) -> None:
    """All ranks have an engine of their own."""
    found = memory(qwen("rollout.vllm.gpu_memory_utilization=0.5"))
    kv_cache = 40 * 10**9 - WEIGHTS - WORKSPACE
    (rank,) = found.ranks
    assert engine_items(rank, "rollout") == [WEIGHTS, kv_cache, WORKSPACE]
    assert rank.phases["rollout"]["workspace"] == 2 * LARGEST
    assert rank.phases["rollout"]["weight sync's bucket"] == LARGEST
    for phase in PHASES:
        assert rank.phases[phase]["rollout engine's CUDA context"] == CONTEXT_BYTES
        assert ("weight sync's bucket" in rank.phases[phase]) == (phase == "rollout")
        assert phase == "rollout" or engine_items(rank, phase) == [0, 0, 0]
    assert found.engine is not None
    assert found.engine.num_tokens == (kv_cache // (16 * OF_TOKEN) - 1) * 16
    assert found.engine.num_tokens // LENGTH == 20
    assert found.engine.num_responses == 16, "its share of 128"


def test_weights_in_fp8(qwen: Callable[..., RunConfig]) -> None:
    """Of a layer the matrices: queries, keys and values, output, gate, up and down."""
    found = memory(qwen("rollout.vllm.quantization=fp8_per_channel"))
    linear = 36 * 2560 * (4096 + 2 * 1024 + 4096 + 3 * 9728)
    assert engine_items(found.ranks[0], "rollout")[0] == WEIGHTS - linear
    assert found.engine is not None
    assert found.engine.kv_cache == 32 * 10**9 - (WEIGHTS - linear) - WORKSPACE


def test_a_cache_of_given_size(qwen: Callable[..., RunConfig]) -> None:
    """It may be larger than the share. Fewer responses at once need less working memory."""
    found = memory(qwen("rollout.vllm.kv_cache_gb=50", "rollout.max_batch_size=2"))
    of_batch = 2 * LENGTH * (3 * 9728 + 4 * 2560) * 2  # gate, up, product, hidden states
    assert 2 * LENGTH > 16_384
    of_batch = of_batch * 16_384 // (2 * LENGTH)
    assert engine_items(found.ranks[0], "rollout") == [WEIGHTS, 50 * 10**9, of_batch]
    assert found.engine is not None
    assert found.engine.num_responses == 2
    with pytest.raises(
        UserError, match=r"the rollout phase needs .* on pipeline rank 0 \(an engine's owner\)"
    ):
        check_fits(found, read_models(found.layout.config), KERNEL, gpu(60), num_gpus=8)


def test_responses_in_addition(qwen: Callable[..., RunConfig]) -> None:
    """An engine's share of 128 is 16, of half as many more 24; both fit in this cache."""
    for settings, expected in (([], 16), (["rollout.oversample=0.5"], 24)):
        found = memory(qwen("rollout.vllm.kv_cache_gb=50", *settings))
        assert found.engine is not None
        assert found.engine.num_responses == expected


@pytest.mark.parametrize(
    ("overrides", "is_awake", "host"),
    [
        (["rollout.vllm.sleep_level=0"], True, 0),
        (["rollout.vllm.sleep_level=1"], False, WEIGHTS),
        (["rollout.vllm.sleep_level=2"], False, 0),
        (["rollout.max_staleness=1"], True, 0),
        # Nothing is generated ahead.
        (["rollout.max_staleness=1", "rollout.oversample=0.5"], False, 0),
    ],
)
def test_asleep(
    qwen: Callable[..., RunConfig], overrides: list[str], is_awake: bool, host: int
) -> None:
    config = qwen("checkpoint.save_interval=null", *overrides)
    found = memory(config)
    (rank,) = found.ranks
    awake = engine_items(rank, "rollout")
    for phase in ("teacher", "student", "optimizer"):
        assert engine_items(rank, phase) == (awake if is_awake else [0, 0, 0])
    assert found.engine is not None
    assert found.engine.host_bytes == host
    # Eight engines on eight GPUs, that is four on four of them; nothing else is offloaded.
    for available in (4 * host, 4 * host - 1):

        def check(available: int = available) -> None:
            check_host_memory(config, num_ranks=8, ranks_on_host=4, available_bytes=available)

        if available == 4 * host:
            check()
        elif host:
            with pytest.raises(UserError, match=r"sleep_level = 1 need 32\.2 GB of host memory"):
                check()


@pytest.mark.parametrize(
    ("layout", "size", "expected"),
    [
        (["tensor_model_parallel_size=4"], 2, ["owner", "with"]),
        (["tensor_model_parallel_size=4"], 4, ["owner", "with"]),
        (
            ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=4"], 4,
            4 * ["owner", "with"],
        ),
    ],
)  # fmt: skip
def test_over_several_gpus(
    qwen: Callable[..., RunConfig], layout: list[str], size: int, expected: list[str]
) -> None:
    settings = [f"parallel.{one}" for one in layout]
    settings += ["rollout.vllm.sleep_level=1", f"rollout.vllm.tensor_model_parallel_size={size}"]
    found = memory(qwen(*settings))
    assert all(rank.has_engine for rank in found.ranks)
    assert ["owner" if rank.owns_engine else "with" for rank in found.ranks] == expected
    weights = -(-WEIGHTS // 2 // size) * 2
    kv_cache = 32 * 10**9 - weights - WORKSPACE
    for rank in found.ranks:
        assert engine_items(rank, "rollout") == [weights, kv_cache, WORKSPACE]
        assert ("weight sync's bucket" in rank.phases["rollout"]) == rank.owns_engine
    assert found.engine is not None
    assert found.engine.host_bytes == weights * size
    heads = 8 // size
    of_block = 2 * 36 * heads * 128 * 2 * 16
    assert found.engine.num_tokens == (kv_cache // of_block - 1) * 16


def test_a_server(qwen: Callable[..., RunConfig]) -> None:
    """One gathered tensor, and no time, since nothing is known of its devices."""
    found = memory(qwen("rollout.vllm.servers=[http://127.0.0.1:8000]"))
    owner, other = found.ranks
    assert owner.phases["rollout"].pop("workspace") == 2 * LARGEST
    assert other.phases["rollout"].pop("workspace") == LARGEST
    assert owner.phases == other.phases
    assert found.engine is None
    seconds = step_seconds(found.layouts, found.largest, gpu(80))
    assert (seconds.prefill, seconds.decode) == (0, 0)
    assert seconds.student.total > 0
    assert sent_bytes(found.layout, found.largest, pp_rank=0).into_engine == WEIGHTS


def test_what_a_sync_sends(qwen: Callable[..., RunConfig]) -> None:
    layout = memory(qwen("parallel.pipeline_model_parallel_size=2")).layout
    workload = memory(qwen("parallel.pipeline_model_parallel_size=2")).largest
    sent = [sent_bytes(layout, workload, pp_rank=pp_rank).into_engine for pp_rank in (0, 1)]
    assert sent == [WEIGHTS, WEIGHTS]
    layout = memory(qwen("rollout.engine=hf")).layout
    assert sent_bytes(layout, workload, pp_rank=0).into_engine == 0


def test_seconds(qwen: Callable[..., RunConfig]) -> None:
    """8 of an engine's 16 responses at a time, each token reading the weights and their caches.

    To that comes the time of 36 layers' launches, of which 24 take 2.7 ms.

    With an engine for each of the two replicas, 64 responses would take eight turns.
    """
    found = memory(qwen("rollout.vllm.kv_cache_gb=11"))
    assert found.engine is not None
    assert (found.engine.num_responses, found.largest.num_sequences) == (8, 64)
    read = WEIGHTS + 8 * (1024 + 8192 / 2) * OF_TOKEN
    seconds = step_seconds(found.layouts, found.largest, gpu(80))
    assert seconds.decode == pytest.approx(2 * 8191 * (read / 3350e9 + 0.00272 / 24 * 36), rel=2e-3)


def test_the_check_of_logprobs_comes_when_the_engine_sleeps(
    qwen: Callable[..., RunConfig],
) -> None:
    """With a small engine it needs more than that; an engine that stays awake is beside it."""
    small = ["rollout.vllm.kv_cache_gb=1.5", "rollout.max_batch_size=1"]
    often = [*small, "rollout.logprob_check_interval=1", "batch.max_tokens=800000"]
    (alone,), (beside,) = (
        memory(qwen(*often, f"rollout.vllm.sleep_level={level}")).ranks for level in (2, 0)
    )
    assert engine_items(alone, "rollout") == [0, 0, 0]
    assert alone.phases["rollout"]["workspace"] == beside.phases["rollout"]["workspace"]
    assert alone.phases["rollout"]["workspace"] > 2 * LARGEST
    assert all(engine_items(beside, "rollout"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "gpu_memory_utilization=0.15",
            r"utilization = 0\.15: of 12\.0 GB weights take 8\.0 and working memory 3\.4, which "
            r"leaves 0\.53 GB of KV cache, room for 3\d{3} tokens; .* has 9216\. Give more, a",
        ),
        ("gpu_memory_utilization=0.05", r"leaves 0\.00 GB of KV cache, room for 0 tokens"),
        ("kv_cache_gb=1.2", r"kv_cache_gb = 1\.2: 1\.20 GB of KV cache, room for 81\d\d tokens"),
    ],
)
def test_no_room_for_a_response(qwen: Callable[..., RunConfig], setting: str, message: str) -> None:
    found = memory(qwen(f"rollout.vllm.{setting}"))
    assert not found.fits(gpu(80))
    with pytest.raises(UserError, match=message):
        check_fits(found, read_models(found.layout.config), KERNEL, gpu(80), num_gpus=8)


def test_just_enough_room(qwen: Callable[..., RunConfig]) -> None:
    """The blocks of one response, and the one that is never used."""
    block = 16 * OF_TOKEN
    enough = (LENGTH // 16 + 1) * block
    for kv_cache, count in ((enough, 1), (enough - block, 0)):
        found = memory(qwen(f"rollout.vllm.kv_cache_gb={kv_cache / 1e9!r}"))
        assert found.engine is not None
        assert found.engine.num_responses == count
        if count:
            check_kv_cache(found.layout.config.rollout.vllm, found.engine, memory_gb=80)


@pytest.mark.parametrize(
    ("overrides", "memory_gb", "expected"),
    [
        (["rollout.vllm.sleep_level=0"], 38, "rollout.vllm.sleep_level=2"),
        (
            ["rollout.vllm.gpu_memory_utilization=0.95"], 45,
            "rollout.vllm.gpu_memory_utilization=0.85",
        ),
        (["rollout.vllm.kv_cache_gb=40"], 50, "rollout.vllm.kv_cache_gb=20.0"),
    ],
)  # fmt: skip
def test_nearest_change(
    qwen: Callable[..., RunConfig], overrides: list[str], memory_gb: float, expected: str
) -> None:
    offload = ["teacher.offload=cpu", "optimizer.offload_states=true"]
    config = qwen(*overrides, *offload)
    models = read_models(config)
    assert not memory(config, memory_gb=memory_gb).fits(gpu(memory_gb))
    found = nearest_that_fits(config, models, KERNEL, gpu(memory_gb), num_gpus=8)
    assert found is not None
    assert str(found).startswith(expected)
    again = qwen(*overrides, *offload, *str(found).split())
    assert memory(again, memory_gb=memory_gb).fits(gpu(memory_gb))
