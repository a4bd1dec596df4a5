"""Plans for published models: against their published sizes, and orders of magnitude by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_oprd.config.load import load_config
from megatron_oprd.config.schema import RecomputeConfig, RunConfig
from megatron_oprd.planning.activations import KERNELS
from megatron_oprd.planning.estimate import (
    MemoryEstimate,
    WorkEstimate,
    estimate_memory,
    estimate_work,
    read_models,
)
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.memory import teacher_bytes
from megatron_oprd.planning.parameters import count_parameters
from tests.planning.models import EXAMPLES, model_folder

pytestmark = pytest.mark.long

H100 = Hardware(memory_gb=80, tflops=989, bandwidth=3350, mfu=0.4)
# Parameters without embedding, final norm and LM head, which are counted beside: by hand.
LARGE_TEACHERS = {
    "DeepSeek-V3": 671_026_419_200 - 2 * 129_280 * 7168 - 7168,
    "Qwen3-Next-80B-A3B-Instruct": 79_674_391_296 - 2 * 151_936 * 2048 - 2048,
}
PAIRS = {
    "qwen": ("qwen3_32b_to_4b.yaml", "Qwen3-4B", "Qwen3-32B"),
    "llama": ("llama31_70b_to_8b.yaml", "Llama-3.1-8B", "Llama-3.1-70B-Instruct"),
}
TRANSFORMERS = ("rollout.engine=hf", "rollout.max_batch_size=16")
# As the safetensors index of each model says, its two copies of a tied embedding counted once.
PUBLISHED = {
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-32B": 32_762_123_264,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B-Instruct": 70_553_706_496,
}


def memory(
    directory: Path, pair: str, num_gpus: int, *overrides: str, kernels: str = "transformer_engine"
) -> MemoryEstimate:
    example, student, teacher = PAIRS[pair]
    config = load_config(
        EXAMPLES / example,
        [
            f"model.student={model_folder(directory, student)}",
            f"model.teacher={model_folder(directory, teacher)}",
            *overrides,
        ],
    )
    return estimate_memory(
        config, read_models(config), KERNELS[kernels], num_gpus=num_gpus, memory_gb=80
    )


def work(estimate: MemoryEstimate) -> WorkEstimate:
    config = estimate.layout.config
    return estimate_work(
        estimate.layouts,
        H100,
        prompt_tokens=config.data.max_prompt_tokens,
        response_tokens=config.rollout.max_new_tokens,
    )


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("num_gpus", [8, 16, 64])
def test_examples_fit(tmp_path: Path, pair: str, num_gpus: int) -> None:
    found = memory(tmp_path, pair, num_gpus)
    assert found.fits(H100)
    assert found.fullest.owns_engine
    assert all(rank.peak_bytes > 10e9 for rank in found.ranks), "no model is that small"


@pytest.mark.parametrize("pair", PAIRS)
def test_all_ranks_together_hold_the_published_models(tmp_path: Path, pair: str) -> None:
    """TP 2 x PP 2: norms are on both tensor ranks, everything else is once, all of it somewhere."""
    layout = memory(
        tmp_path, pair, 8,
        "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2",
        "model.make_vocab_size_divisible_by=2", "taps.layers=all",
    ).layout  # fmt: skip
    _, student, teacher = PAIRS[pair]
    for name, model in ((student, layout.student), (teacher, layout.teacher)):
        a = model.architecture
        norms = a.num_layers * (2 * a.hidden_size + (2 * a.head_dim if a.qk_norm else 0))
        total = 2 * sum(count_parameters(layout, model, stage).total for stage in (0, 1))
        left_out = 0 if model is layout.student else a.vocab_size * a.hidden_size  # its LM head
        assert total - norms - a.hidden_size + left_out == PUBLISHED[name]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "recipe",
    ["per_channel_log", "per_channel", "block_128", "tensorwise", "blockwise", "mxfp8"],
)
def test_fp8_teacher(tmp_path: Path, pair: str, recipe: str) -> None:
    """A teacher of 30B and more takes at most 55% of its bf16 weights' memory."""
    in_bf16, in_fp8 = (
        teacher_bytes(memory(tmp_path, pair, 8, setting).layout, pp_rank=0, itemsize=2).weights
        for setting in ("teacher.precision=bf16", f"teacher.fp8_recipe={recipe}")
    )
    assert 0.5 < in_fp8 / in_bf16 <= 0.55


def test_static_memory_by_hand(tmp_path: Path) -> None:
    """Llama-3.1-8B on TP 8 x DP 8: 2 + 4 + 12 / 8 bytes a parameter; the LM head is frozen."""
    found = memory(tmp_path, "llama", 64, *TRANSFORMERS)
    parameters, head = PUBLISHED["Llama-3.1-8B"] / 8, 128_256 * 4096 / 8
    phase = found.fullest.phases["optimizer"]
    assert phase["student parameters"] == pytest.approx(2 * parameters, rel=1e-3)
    assert phase["gradients"] == pytest.approx(4 * (parameters - head), rel=1e-3)
    assert phase["optimizer states"] == pytest.approx(12 / 8 * (parameters - head), rel=1e-3)
    assert phase["rollout engine's weights"] == 2 * PUBLISHED["Llama-3.1-8B"]


def test_kv_cache_by_hand(tmp_path: Path) -> None:
    """Llama-3.1-8B keeps 128 KiB a token; transformers copies a layer's part at each."""
    found = memory(tmp_path, "llama", 8, *TRANSFORMERS, "rollout.max_batch_size=4")
    tokens = 4 * (1024 + 8192)
    cache = found.fullest.phases["rollout"]["KV cache"]
    assert cache == pytest.approx(tokens * 128 * 1024 * 33 / 32)


def test_targets_by_hand(tmp_path: Path) -> None:
    """36 tapped layers x 2000 positions x 5120 numbers in bf16 a sequence, on one slice of it."""
    found = memory(tmp_path, "qwen", 64, "teacher.target_memory_gb=null")
    assert found.largest.num_sequences == 8
    assert found.fullest.phases["teacher"]["targets"] == 8 * 36 * 2000 * 5120 * 2
    grouped = memory(tmp_path, "qwen", 64, "teacher.target_memory_gb=3")
    assert (grouped.largest.group_size, grouped.largest.num_groups) == (2, 2)
    assert grouped.fullest.phases["teacher"]["targets"] == 4 * 36 * 2000 * 5120 * 2


def test_activations_by_hand(tmp_path: Path) -> None:
    """34 bytes x s b h a layer (arXiv:2205.05198) is for GELU, dropout and a 4 h wide MLP.

    With gated SiLU, no dropout and grouped queries the same count, term by term, gives for
    Llama-3.1-8B, in elements of h: norms 2 x 2, query, key and value 1.5, query and key again 1.25,
    attention's output 1, gate, up and product 3 x 3.5; 2 bytes each.
    """
    overrides = [
        "recompute={recompute_granularity: null, recompute_method: null,"
        " recompute_num_layers: null}",
        "taps.layers=last",
        "parallel={tensor_model_parallel_size: 1, sequence_parallel: false}",
    ]
    found = memory(tmp_path, "llama", 8, *overrides).fullest.phases["student"]["activations"]
    by_hand = 2 * (4 + 1.5 + 1.25 + 1 + 10.5) * 4096 * 2 * 9216 * 32
    assert found == pytest.approx(by_hand, rel=0.02)  # rotations, log-sum-exp, the tap


def test_offload(tmp_path: Path) -> None:
    plain = memory(tmp_path, "qwen", 8).fullest.phases
    found = memory(
        tmp_path, "qwen", 8, "teacher.offload=cpu", "optimizer.offload_states=true",
        "teacher.target_memory_gb=null",
    ).fullest  # fmt: skip
    teacher, states = (plain["optimizer"][item] for item in ("teacher weights", "optimizer states"))
    assert found.host_bytes == teacher + states
    there = {
        item: {phase for phase, items in found.phases.items() if item in items}
        for item in ("teacher weights", "optimizer states", "gradients")
    }
    assert there == {
        "teacher weights": {"teacher"},
        "optimizer states": {"optimizer"},
        "gradients": {"student", "optimizer"},
    }
    # With several groups of micro-batches gradients wait for the next teacher pass.
    grouped = memory(tmp_path, "qwen", 8, "optimizer.offload_states=true").fullest.phases
    assert {phase for phase, items in grouped.items() if "gradients" in items} == {
        "teacher", "student", "optimizer",
    }  # fmt: skip


def test_flops_and_times_by_hand(tmp_path: Path) -> None:
    """2 FLOPs a weight and token forward, 8 with backward and recompute, and attention."""
    estimate = memory(tmp_path, "llama", 64, *TRANSFORMERS)
    found = work(estimate)
    tokens, length = 16 * 9216, 9216

    def forward(name: str, layers: int, width: int, has_head: bool) -> float:
        embeddings = 128_256 * width * (2 if has_head else 1)
        weights = PUBLISHED[name] - embeddings
        return 2 * weights * tokens + layers * tokens * 2 * length * width

    teacher = forward("Llama-3.1-70B-Instruct", 80, 8192, has_head=True)
    assert found.stages[0].teacher == pytest.approx(teacher, rel=1e-3)
    student = forward("Llama-3.1-8B", 32, 4096, has_head=True)
    attention = 32 * tokens * 2 * length * 4096
    assert found.stages[0].student == pytest.approx(4 * student + attention / 2, rel=1e-3)
    assert found.seconds.teacher.compute == pytest.approx(teacher / 8 / (0.4 * 989e12), rel=1e-3)
    # Each of 8191 tokens reads 16 GB of weights and, on average, a cache of 5120 tokens.
    # transformers launches the kernels of 32 layers from Python, which takes longer than to read.
    read = 2 * PUBLISHED["Llama-3.1-8B"] + 16 * 5120 * 128 * 1024 * 33 / 32
    assert read / 3350e9 < 0.01 < 0.023 / 24 * 32
    assert found.seconds.decode == pytest.approx(8191 * 0.023 / 24 * 32, rel=1e-3)
    with_vllm = work(memory(tmp_path, "llama", 64))
    assert with_vllm.seconds.decode < found.seconds.decode / 3


def test_pipeline_bubble(tmp_path: Path) -> None:
    """(p - 1) / m of a stage's time; two chunks a rank halve it."""
    sizes = "parallel.tensor_model_parallel_size=4", "parallel.pipeline_model_parallel_size=2"
    plain = work(memory(tmp_path, "llama", 8, *sizes, "teacher.target_memory_gb=null"))
    chunks = "parallel.virtual_pipeline_model_parallel_size=2"
    interleaved = work(
        memory(tmp_path, "llama", 8, *sizes, chunks, "teacher.target_memory_gb=null")
    )
    m = plain.workload.num_micro_batches
    assert interleaved.workload.num_micro_batches == m == 64
    for found, chunks_of_rank in ((plain, 1), (interleaved, 2)):
        for one in (found.seconds.teacher, found.seconds.student):
            assert one.bubble == pytest.approx((one.compute + one.messages) / m / chunks_of_rank)
    sent = plain.seconds.student.pipeline, interleaved.seconds.student.pipeline
    assert 0 < sent[0] < sent[1], "chunks cost messages"


def large_teacher(
    directory: Path, student: str, teacher: str, *, has_experts: bool = True
) -> RunConfig:
    """On 64 GPUs: 8 stages of 8 ranks, with the teacher's experts shared out."""
    experts = "teacher.expert_model_parallel_size=8", "teacher.expert_tensor_parallel_size=1"
    layout = (
        "tensor_model_parallel_size=8", "sequence_parallel=true", "pipeline_model_parallel_size=8",
    )  # fmt: skip
    return load_config(
        EXAMPLES / "qwen3_32b_to_4b.yaml",
        [
            f"model.student={model_folder(directory, student)}",
            f"model.teacher={model_folder(directory, teacher)}",
            "teacher.precision=bf16",
            *(experts if has_experts else ()),
            *(f"parallel.{one}" for one in layout),
        ],
    )


@pytest.mark.parametrize("teacher", LARGE_TEACHERS)
def test_a_large_teacher_fits_on_64_gpus(tmp_path: Path, teacher: str) -> None:
    """Every layer is on one stage; of its matrices a rank has an eighth."""
    config = large_teacher(tmp_path, "Qwen3-8B", teacher)
    found = estimate_memory(
        config, read_models(config), KERNELS["transformer_engine"], num_gpus=64, memory_gb=80
    )
    weights = [teacher_bytes(found.layout, pp_rank=rank, itemsize=2).weights for rank in range(8)]
    built = sum(found.layout.teacher.extent.layers_per_stage)
    count = found.layout.teacher.architecture.num_layers
    # What every rank holds whole (norms, routers, narrow states' matrices) is a few percent.
    eighth = 2 * LARGE_TEACHERS[teacher] * built / count / 8
    assert sum(weights) == pytest.approx(eighth, rel=0.1)


def test_what_a_student_with_linear_attention_keeps(tmp_path: Path) -> None:
    """What linear attention's 48 value heads keep is the largest part, by hand."""
    config = large_teacher(tmp_path, "Qwen3.5-27B", "Qwen3-32B", has_experts=False)
    found = estimate_memory(
        replace(config, recompute=RecomputeConfig()),
        read_models(config),
        KERNELS["transformer_engine"],
        num_gpus=64,
        memory_gb=80,
    )
    student, largest = found.layout.student, found.largest
    linear = sum(map(student.architecture.has_delta_net, student.extent.layers_of_stage(0)))
    # For each token, in bytes: channels before, behind and after the convolution; six numbers for
    # each token of a chunk; vectors of keys and values in fp32; gates and outputs; the states.
    channels, heads, dim = 16 * (2 + 3) * 128, 48, 128
    kept = channels * (2 + 2 + 4) + 6 * heads * 64 * 4 + heads * 9 * dim * 4
    kept += heads * dim * 18 + heads * dim * dim * 4 // 64
    # Heads are on 8 ranks; the first of 8 stages has 8 micro-batches under way.
    tokens = largest.num_rows * largest.row_tokens
    assert largest.num_micro_batches >= 8
    assert linear == 6
    activations = found.ranks[0].phases["student"]["activations"]
    assert 1 < activations / (8 * linear * tokens * kept // 8) < 1.5
