"""The main test: no layout changes what a step computes, up to rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_oprd.rollout.hf import checkpoint_tensors
from tests.helpers.bridges import save_random_bridge
from tests.helpers.closeness import assert_close_relative
from tests.helpers.pairs import LINEAR_UPDATES, fixed_rollouts, save_pair
from tests.helpers.ranks import run_ranks

TP2 = "parallel.tensor_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
PP2 = "parallel.pipeline_model_parallel_size=2"
PP4 = "parallel.pipeline_model_parallel_size=4"
CP2 = "parallel.context_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
MBS1 = "batch.micro_batch_size=1"
MBS2 = "batch.micro_batch_size=2"
PACKED = "batch.sequence_packing=true"
SELECTIVE = ["recompute.recompute_granularity=selective"]
FULL = [
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=uniform",
    "recompute.recompute_num_layers=1",
]
FULL_BLOCK = [
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=block",
    "recompute.recompute_num_layers=1",
]
DISTRIBUTE = "recompute.distribute_saved_activations=true"
OVERLAP = "optimizer.overlap_grad_reduce=true"
OVERLAP_GATHER = "optimizer.overlap_param_gather=true"
# Less than the targets of the rollouts' eight sequences together.
FEW_TARGETS = "teacher.target_memory_gb=1.2e-5"
# The distributed optimizer leaves each rank with its own part of the gradients.
WHOLE_GRADIENTS = "optimizer.use_distributed_optimizer=false"

# name: (ranks, overrides, whether gradients are whole on every rank)
LAYOUTS: dict[str, tuple[int, list[str], bool]] = {
    "mbs1": (1, [MBS1], True),
    "token_budget": (1, ["batch.max_tokens=40"], True),
    "packed": (1, [PACKED, "batch.max_tokens=40"], True),
    "target_groups": (1, [MBS1, FEW_TARGETS], True),
    "offloaded_teacher": (1, [MBS2, "teacher.offload=cpu"], True),
    "selective": (1, [MBS2, *SELECTIVE], True),
    "full": (1, [MBS2, *FULL], True),
    "full_of_two_layers": (1, [MBS2, *FULL[:2], "recompute.recompute_num_layers=2"], True),
    "tp2": (2, [TP2], True),
    "tp2_sp": (2, [TP2, SP, MBS2], True),
    "tp2_sp_full": (2, [TP2, SP, MBS2, *FULL], True),
    "tp2_full_distributed": (2, [TP2, MBS2, *FULL, DISTRIBUTE], True),
    "tp2_sp_target_groups": (2, [TP2, SP, MBS1, FEW_TARGETS], True),
    "pp2": (2, [PP2, MBS2], True),
    "tp2_sp_packed": (2, [TP2, SP, PACKED, "batch.max_tokens=40", FEW_TARGETS], True),
    "pp2_packed_full": (2, [PP2, PACKED, "batch.max_tokens=60", *FULL], True),
    "pp2_selective": (2, [PP2, MBS2, *SELECTIVE], True),
    "pp2_full": (2, [PP2, MBS1, *FULL], True),
    "pp2_full_block": (2, [PP2, MBS1, *FULL_BLOCK], True),
    "pp2_uneven": (2, [PP2, MBS2, "parallel.num_layers_per_stage=[1,3]"], True),
    "pp2_vpp2": (2, [PP2, VPP2, MBS2], True),
    "pp2_vpp2_target_groups": (2, [PP2, VPP2, MBS1, FEW_TARGETS, "teacher.offload=cpu"], True),
    "pp2_vpp2_full": (2, [PP2, VPP2, MBS1, *FULL], True),
    "cp2": (2, [CP2, MBS2, WHOLE_GRADIENTS], True),
    "cp2_full": (2, [CP2, MBS1, *FULL, WHOLE_GRADIENTS], True),
    "dp2": (2, [MBS2, WHOLE_GRADIENTS], True),
    "dp2_distributed_optimizer": (2, [MBS2], False),
    "pp4": (4, [PP4, MBS2], True),
    # Fewer key/value heads than ranks.
    "tp4_sp": (4, ["parallel.tensor_model_parallel_size=4", SP, MBS2], True),
    "tp2_pp2": (4, [TP2, PP2, MBS2], True),
    "tp2_sp_pp2_full": (4, [TP2, SP, PP2, MBS1, *FULL], True),
    "cp2_tp2_sp": (4, [CP2, TP2, SP, MBS2, FEW_TARGETS, WHOLE_GRADIENTS], True),
    "cp2_pp2_vpp2": (4, [CP2, PP2, VPP2, MBS2, WHOLE_GRADIENTS], True),
    "cp2_dp2": (4, [CP2, MBS2], False),
    "dp2_pp2": (4, [PP2, MBS1, WHOLE_GRADIENTS], True),
    "dp2_overlap_target_groups": (2, [MBS1, FEW_TARGETS, OVERLAP, OVERLAP_GATHER], False),
    "dp2_pp2_overlap": (4, [PP2, MBS1, OVERLAP], False),
    "dp2_pp2_overlap_both": (4, [PP2, MBS1, OVERLAP, OVERLAP_GATHER], False),
    "dp2_tp2_sp": (4, [TP2, SP, MBS2], False),
}
EP2 = "parallel.expert_model_parallel_size=2"
T_EP1, T_EP2, T_EP4 = (f"teacher.expert_model_parallel_size={n}" for n in (1, 2, 4))
T_ETP1 = "teacher.expert_tensor_parallel_size=1"
ETP1 = "parallel.expert_tensor_parallel_size=1"
# Layouts of mixtures of experts: expert parallelism over data-parallel ranks, over tensor-parallel
# ranks (ETP 1), and over both.
MOE_LAYOUTS: dict[str, tuple[int, list[str], bool]] = {
    "ep2": (2, [EP2, MBS2, WHOLE_GRADIENTS], True),
    "ep2_overlap_both": (2, [EP2, MBS1, OVERLAP, OVERLAP_GATHER, FEW_TARGETS], False),
    "tp2_sp_etp1": (2, [TP2, SP, ETP1, MBS2, WHOLE_GRADIENTS], True),
    "tp2_sp_etp1_distributed_optimizer": (2, [TP2, SP, ETP1, MBS2], False),
    "tp2_sp_etp1_ep2": (2, [TP2, SP, ETP1, EP2, MBS2], True),
    "ep2_pp2": (4, [EP2, PP2, MBS2, WHOLE_GRADIENTS], True),
    "ep2_pp2_vpp2_full": (4, [EP2, PP2, VPP2, MBS1, *FULL, WHOLE_GRADIENTS], True),
    "dp2_ep2": (4, [EP2, MBS2], False),
    "tp2_sp_ep2": (4, [TP2, SP, EP2, MBS2, WHOLE_GRADIENTS], True),
    # The teacher's experts divided otherwise than the student's.
    "dp2_teacher_ep2": (2, [MBS2, T_EP2, WHOLE_GRADIENTS], True),
    "ep2_teacher_ep1_overlap": (2, [EP2, MBS1, T_EP1, OVERLAP], False),
    "tp2_sp_pp2_teacher_etp1_ep2": (4, [TP2, SP, PP2, MBS2, T_EP2, T_ETP1], True),
    "dp2_tp2_sp_teacher_ep4": (4, [TP2, SP, EP2, T_EP4, T_ETP1, MBS2, WHOLE_GRADIENTS], True),
}
# Teachers that read several of the student's micro-batches together; some of one replica's, or of
# one group, are not put together.
TOGETHER = "teacher.max_tokens=70"
FEW_TOKENS = "batch.max_tokens=30"
TOGETHER_LAYOUTS: dict[str, tuple[int, list[str], bool]] = {
    "together": (1, [MBS1, FEW_TOKENS, TOGETHER], True),
    "packed_together": (1, [PACKED, FEW_TOKENS, TOGETHER], True),
    "tp2_together_offload": (2, [TP2, FEW_TOKENS, TOGETHER, "teacher.offload=cpu"], True),
    "tp2_sp_together": (2, [TP2, SP, MBS1, FEW_TOKENS, TOGETHER, FEW_TARGETS], True),
    "tp2_sp_packed_together": (2, [TP2, SP, PACKED, FEW_TOKENS, TOGETHER], True),
    "pp2_full_together": (2, [PP2, MBS1, FEW_TOKENS, TOGETHER, *FULL], True),
    "pp2_vpp2_together": (2, [PP2, VPP2, MBS1, FEW_TOKENS, TOGETHER], True),
    "cp2_together": (2, [CP2, MBS1, FEW_TOKENS, TOGETHER, WHOLE_GRADIENTS], True),
    "dp2_together": (2, [FEW_TOKENS, TOGETHER, OVERLAP, OVERLAP_GATHER], False),
    "ep2_together": (2, [EP2, MBS1, FEW_TOKENS, TOGETHER, WHOLE_GRADIENTS], True),
    "ep2_pp2_together": (4, [EP2, PP2, MBS1, FEW_TOKENS, TOGETHER, WHOLE_GRADIENTS], True),
    "cp2_tp2_sp_together": (
        4, [CP2, TP2, SP, FEW_TOKENS, TOGETHER, FEW_TARGETS, WHOLE_GRADIENTS], True,
    ),
}  # fmt: skip
ALL_LAYOUTS = LAYOUTS | MOE_LAYOUTS | TOGETHER_LAYOUTS
PAIRS = {
    "llama_equal": {"family": "llama"},
    "llama_tied_deeper": {"family": "llama", "teacher_layers": 7, "tied": True},
    "qwen3_equal": {"family": "qwen3", "tied": True},
    "qwen3_deeper": {"family": "qwen3", "teacher_layers": 7},
}
# Two student layers share a teacher layer, so not every stage can end where it likes.
SHALLOWER = {"llama_shallower": {"family": "llama", "teacher_layers": 3}}
# Every layer of the student slides, and some of the teacher's; both have YaRN.
WINDOWS = {
    "windows": {
        "family": "mistral",
        "teacher_family": "qwen2",
        "sliding_window": 5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
        },
        "teacher_fields": {
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    },
}
# A student with layers that are not rotated.
WITHOUT_ROPE = {
    "without_rope": {
        "family": "smollm3",
        "teacher_family": "seed_oss",
        "teacher_layers": 5,
        "tied": True,
    },
}
# Norms behind attention and MLP, with and without norms before them; norms over all heads.
POST_NORMS = {
    "post_norms": {"family": "olmo2", "teacher_family": "glm4", "teacher_layers": 5},
    # Two rotations in each model.
    "two_ropes": {"family": "olmo3"},
}
# Biases of q, k, v, o and the MLP; of the MLP alone in the teacher.
BIASES = {
    "biases": {
        "family": "llama",
        "teacher_family": "granite",
        "mlp_bias": True,
        "attention_bias": True,
        "teacher_fields": {"attention_bias": False},
    },
}
# Norms of 1 + weight, before and behind; GELU; scaled embeddings; two rotations.
GEMMA = {
    "zero_centered_norms": {"family": "gemma3_text", "teacher_layers": 4, "tied": True},
    # Softcaps of scores and logits, in windows and without.
    "softcaps": {"family": "gemma2", "tied": True},
}
# Factors on embeddings, scores, residuals and logits.
MULTIPLIERS = {
    "multipliers": {"family": "granite", "teacher_family": "exaone4", "tied": True},
}
OTHER_VOCABULARY = {
    "qwen3_other_vocabulary": {"family": "qwen3", "teacher_layers": 5, "teacher_vocab_size": 150}
}
MOE_PAIRS = {
    "moe": {"family": "qwen3_moe", "teacher_layers": 6},
    "moe_teacher": {"family": "qwen3", "teacher_family": "qwen3_moe"},
    "moe_student": {"family": "qwen3_moe", "teacher_family": "qwen3", "tied": True},
    # A first layer without experts, sigmoids and their bias in the router.
    "sigmoid_router": {"family": "qwen2_moe", "teacher_family": "glm4_moe", "teacher_layers": 6},
    "sigmoid_router_student": {"family": "glm4_moe", "teacher_family": "qwen3"},
    # Sigmoids in the router and norms over all heads, in one layer.
    "sigmoids_and_wide_norms": {"family": "minimax_m2", "teacher_layers": 6},
    # Latent attention, and groups of experts.
    "latent": {"family": "deepseek_v3", "teacher_layers": 6},
    # Linear attention, gated attention, and norms with one more than their weight.
    "linear_attention": {"family": "qwen3", "teacher_family": "qwen3_next"},
    # A sequence's first output is its value, up to a factor that the norm behind it takes away
    # again: with a small epsilon its gradient is large, and with it the rounding.
    "linear_attention_student": {
        "family": "qwen3_next",
        "teacher_family": "qwen3_moe",
        "rms_norm_eps": 0.01,
    },
    # Without experts in the student, and with projections of the input apart in both.
    "linear_attention_dense": {
        "family": "qwen3_5_text",
        "teacher_family": "qwen3_5_moe_text",
        "rms_norm_eps": 0.01,
    },
    # Attention sinks, biases of experts, windows by layer.
    "sinks": {"family": "gpt_oss", "teacher_layers": 6},
    # An expert for all tokens, with its gate.
    "shared_expert": {"family": "qwen2_moe", "teacher_family": "mixtral"},
}
# A teacher wider and deeper than its student, through a bridge.
WIDER = {
    "bridge": {
        "family": "qwen3",
        "teacher_layers": 7,
        "tied": True,
        "teacher_fields": {"hidden_size": 48},
    },
}
BRIDGED = "loss: {normalize: l2, coefficient: 100}\nbridge: {rank: 5, path: %s}\n"
# Updates that are large against the tolerance, and about linear in the gradient: Adam turns the
# rounding of a tiny gradient into a step of the same size as any other.
# Settings of the method, each with its own single-process reference.
METHODS: dict[str, list[str]] = {
    "default": [],
    "even_last_k_sequence_mean": [
        "taps.layers=even",
        "taps.positions=last_k",
        "taps.k=3",
        "loss.aggregation=sequence_mean",
        "loss.normalize=l2",
        "loss.coefficient=100",
    ],
    # The teacher's last layer, and its final norm, sit on a stage that is not the last.
    "last_teacher_layer_early": ["taps.layers=[0,2]", "taps.layer_map=[1,3]"],
    "token_pre_norm": ["taps.alignment=token", "taps.last_layer=pre_norm"],
    "fp8_teacher": ["teacher.precision=fp8"],
    "fp8_block_teacher": ["teacher.precision=fp8", "teacher.fp8_recipe=block_128"],
}
FP8 = ("fp8_teacher", "fp8_block_teacher")
OUTPUT = "output_loss.kind="
# mu = 0, 1 and 10; chunks that divide a micro-batch's positions.
OUTPUT_METHODS: dict[str, list[str]] = {
    "sampled_token": [OUTPUT + "sampled_token", "taps.layers=none"],
    "top_k": [OUTPUT + "top_k", "output_loss.k=5", "output_loss.chunk_tokens=7"],
    "top_k_reference": [
        OUTPUT + "top_k",
        "output_loss.k=5",
        "output_loss.top_k_variant=reference",
        "taps.layers=none",
    ],
    "top_k_union": [
        OUTPUT + "top_k",
        "output_loss.support=union",
        "output_loss.support_weights=teacher_p",
        "loss.coefficient=10",
    ],
    "reverse_kl": [OUTPUT + "reverse_kl", "loss.coefficient=0", "output_loss.coefficient=2"],
    "forward_kl": [
        OUTPUT + "forward_kl",
        "taps.layers=[0,2]",
        "loss.layer_weights=[1,0.5]",
        "output_loss.positions=last_k",
        "output_loss.positions_k=3",
        "loss.aggregation=sequence_mean",
    ],
    "jsd": [OUTPUT + "jsd", "output_loss.beta=0.3", "output_loss.student_temperature=0.7"],
    # Both coefficients differ between the two steps.
    "crossfade": [
        OUTPUT + "top_k",
        "taps.layers=last_n",
        "taps.n=2",
        "loss.coefficient_points=[[0,10],[2,1]]",
        "output_loss.coefficient_points=[[0,0.1],[3,1]]",
        "output_loss.coefficient_schedule=cosine",
    ],
}
METHODS |= OUTPUT_METHODS
# A teacher that reads other sequences than the student.
READING_METHODS: dict[str, list[str]] = {
    "other_prompt": [OUTPUT + "reverse_kl", "output_loss.positions=last_k",
                     "output_loss.positions_k=4"],
    "other_tokens": ["taps.alignment=token"],
    "other_tokens_sequence_mean": ["loss.aggregation=sequence_mean", "taps.layers=odd"],
}  # fmt: skip
METHODS |= READING_METHODS
# Three teachers: one with an output-space loss, two on hidden states; the last has the even
# sequences, the second the odd ones. TEACHERS is the folder of all pairs.
SEVERAL = "three_teachers"
METHODS[SEVERAL] = [
    OUTPUT + "jsd",
    "extra_teachers=[{model: TEACHERS/qwen3_equal/teacher, prompt_share: 0.5, coefficient: 2},"
    " {model: TEACHERS/llama_equal/teacher, layers: [0, 2], layer_map: [1, 3], prompt_share: 0.5}]",
]
# The student's log-probabilities are taken on the way, the last layer and the head being frozen, or
# not. The reference goes without.
LOGPROB_METHODS = {
    "logprobs": ["taps.layers=[0,2]"],
    "logprobs_and_head": [OUTPUT + "reverse_kl", "taps.layers=none"],
}
METHODS |= LOGPROB_METHODS
METHODS["ride"] = ["ride.base=TEACHERS/qwen3_equal/teacher", "ride.lambda=1.5"]
METHODS["other_precision"] = [
    "extra_teachers=[{model: TEACHERS/qwen3_equal/teacher, precision: fp8, offload: cpu}]",
]
METHODS["shallow_first_teacher"] = [
    "taps.layers=[0]",
    "extra_teachers=[{model: TEACHERS/llama_equal/teacher, layers: [1, 2]}]",
]
# Projectors that train: linear ones to a wider teacher, in place of the pair's bridge, and others
# between equal widths.
PROJECTOR_METHODS = {
    "trainable_linear": ["bridge.path=null", "bridge.rank=null", "bridge.trainable=linear"],
    "trainable_mlp": [
        "bridge.trainable=mlp",
        "bridge.hidden_size=20",
        "bridge.lr_mult=3",
        "taps.layers=[1,3]",
        "output_loss.kind=top_k",
    ],
}
METHODS |= PROJECTOR_METHODS
TAUGHT_BY = {SEVERAL: [[True] * 8, [False, True] * 4, [True, False] * 4]}
# Responses that the student wrote in part: counted from the end, and for a teacher that reads other
# tokens.
GAP_METHODS = {
    "gaps": [OUTPUT + "top_k", "output_loss.k=5", "taps.positions=last_k", "taps.k=3"],
    "gaps_other_tokens": ["loss.aggregation=sequence_mean"],
}
METHODS |= GAP_METHODS
READINGS = {name: name.removesuffix("_sequence_mean") for name in READING_METHODS}
READINGS["gaps_other_tokens"] = "other_tokens"
# The layouts in which the last stage, its head and the positions differ most.
OUTPUT_LAYOUTS = (
    "packed",
    "target_groups",
    "offloaded_teacher",
    "tp2_sp_full",
    "pp2_vpp2_target_groups",
    "cp2_tp2_sp",
    "tp2_sp_pp2_full",
    "dp2_overlap_target_groups",
    "dp2_pp2_overlap_both",
)
# Every layout with the default method on the pairs whose teacher is deeper, those of few ranks on
# the other two; and the layouts that differ most with other settings.
DEEPER = ("llama_tied_deeper", "qwen3_deeper")
DEFAULTS = [
    (pair, "default", layout)
    for pair in PAIRS
    for number, (layout, (ranks, _, _)) in enumerate(LAYOUTS.items())
    if pair in DEEPER or (ranks < 4 and number % 2 == 0)
]
OTHERS = [
    (pair, method, layout)
    for pair in DEEPER
    for method in ("even_last_k_sequence_mean", "token_pre_norm")
    for layout in ("tp2_sp_full", "pp2_vpp2", "tp2_sp_pp2_full", "dp2_pp2")
]
EARLY = "last_teacher_layer_early"
CASES = [
    *DEFAULTS,
    *OTHERS,
    *((pair, "default", layout) for pair in SHALLOWER for layout in ("pp2", "tp2_sp_pp2_full")),
    *(("llama_equal", EARLY, layout) for layout in ("pp2_vpp2", "pp2_vpp2_full", "tp2_sp_full")),
    *(
        ("windows", "default", layout)
        for layout in ("tp2_sp_packed", "pp2_selective", "pp2_vpp2_full", "cp2_tp2_sp")
    ),
    *(
        ("without_rope", "default", layout)
        for layout in ("pp2_packed_full", "tp2_sp_full", "pp2_vpp2", "cp2")
    ),
    *(
        ("post_norms", "default", layout)
        for layout in ("tp2", "tp2_sp_packed", "pp2_vpp2_full", "cp2", "tp4_sp")
    ),
    *(("two_ropes", "default", layout) for layout in ("tp2_sp_packed", "pp2_vpp2_full", "cp2")),
    *(("biases", "default", layout) for layout in ("tp2_sp_full", "pp2_vpp2_full")),
    *(
        ("zero_centered_norms", "default", layout)
        for layout in ("tp2_sp_packed", "pp2_vpp2_full", "cp2")
    ),
    *(("multipliers", "reverse_kl", layout) for layout in ("tp2_sp_full", "pp2_vpp2")),
    ("multipliers", "logprobs", "tp2"),
    *(("softcaps", "reverse_kl", layout) for layout in ("tp2_sp_packed", "pp2_vpp2_full", "cp2")),
    ("softcaps", "logprobs", "tp2"),
    *(("moe", "default", layout) for layout in ("mbs1", "tp2_sp", "pp2_vpp2", *MOE_LAYOUTS)),
    *(("moe_teacher", "default", layout) for layout in ("tp2", "ep2_pp2", "tp2_sp_etp1_ep2")),
    *(
        ("moe_teacher", "default", layout)
        for layout in ("dp2_teacher_ep2", "tp2_sp_pp2_teacher_etp1_ep2")
    ),
    *(("moe_student", "default", layout) for layout in ("tp2_sp_full", "ep2_pp2")),
    ("sigmoid_router", "default", "tp2_sp_pp2_teacher_etp1_ep2"),
    *(("sigmoid_router_student", "default", layout) for layout in ("tp2_sp_etp1_ep2", "ep2_pp2")),
    *(("sigmoids_and_wide_norms", "default", layout) for layout in ("ep2_pp2", "tp2_sp_ep2")),
    *(("latent", "default", layout) for layout in ("tp2_sp_packed", "cp2", "ep2_pp2_vpp2_full")),
    ("latent", FP8[0], "tp2_sp_etp1_ep2"),
    *(("linear_attention", "default", layout) for layout in ("tp2_sp_packed", "tp2_pp2")),
    ("linear_attention", FP8[0], "tp2_sp_packed"),
    ("linear_attention_dense", "default", "tp2_sp_packed"),
    *(
        ("linear_attention_student", "default", layout)
        for layout in ("packed", "tp2_sp_packed", "ep2_pp2_vpp2_full")
    ),
    *(
        ("shared_expert", "default", layout)
        for layout in ("tp2_sp_etp1_ep2", "ep2_pp2_vpp2_full", "tp2_sp_ep2")
    ),
    *(
        ("sinks", "default", layout)
        for layout in ("tp2_sp_etp1_ep2", "packed", "cp2_full", "ep2_pp2_vpp2_full")
    ),
    ("sinks", "default", "tp2_sp_etp1"),
    ("sinks", FP8[0], "tp2_sp_etp1_ep2"),
    *(
        ("qwen3_deeper", method, layout)
        for method in FP8
        for layout in ("tp2", "tp2_sp_full", "pp2_vpp2_target_groups", "tp4_sp", "cp2_tp2_sp")
    ),
    *(("moe_teacher", FP8[0], layout) for layout in ("ep2_pp2", "tp2_sp_etp1_ep2")),
    ("post_norms", FP8[0], "tp2_sp_full"),
    ("sigmoid_router", FP8[0], "tp2_sp_etp1_ep2"),
    # Tied and untied heads, a teacher with another vocabulary, and a head beside experts.
    *(("llama_tied_deeper", "top_k", layout) for layout in OUTPUT_LAYOUTS),
    *(("qwen3_other_vocabulary", "jsd", layout) for layout in OUTPUT_LAYOUTS[:-2]),
    *(
        (pair, method, layout)
        for pair, methods in (
            ("llama_tied_deeper", ("sampled_token", "forward_kl")),
            ("qwen3_other_vocabulary", ("top_k_union", "reverse_kl")),
        )
        for method in methods
        for layout in ("tp2_sp_full", "tp2_pp2", "cp2_pp2_vpp2")
    ),
    *(
        ("llama_tied_deeper", "crossfade", layout)
        for layout in ("tp2_sp_full", "pp2_vpp2_target_groups", "dp2_pp2_overlap_both")
    ),
    ("qwen3_other_vocabulary", "top_k_reference", "tp2_sp_full"),
    *(("llama_tied_deeper", "other_prompt", layout) for layout in OUTPUT_LAYOUTS[:-2]),
    *(("qwen3_equal", "other_tokens", layout) for layout in OUTPUT_LAYOUTS),
    *(
        ("moe_teacher", "other_tokens_sequence_mean", layout)
        for layout in ("ep2_pp2", "tp2_sp_etp1_ep2")
    ),
    *(("llama_tied_deeper", SEVERAL, layout) for layout in OUTPUT_LAYOUTS[:-2]),
    *(
        ("llama_tied_deeper", "gaps", layout)
        for layout in ("packed", "tp2_sp_full", "pp2_vpp2_target_groups", "cp2_tp2_sp", "dp2_pp2")
    ),
    *(
        ("qwen3_equal", "gaps_other_tokens", layout)
        for layout in ("tp2_sp_packed", "pp2_vpp2_target_groups", "cp2_tp2_sp")
    ),
    *(
        ("llama_tied_deeper", method, layout)
        for method in ("ride", "other_precision")
        for layout in ("tp2_sp_full", "pp2_vpp2_target_groups")
    ),
    *(
        ("qwen3_deeper", "shallow_first_teacher", layout)
        for layout in ("pp2", "pp2_vpp2_full", "tp2_sp_pp2_full")
    ),
    *(
        ("llama_tied_deeper", "logprobs", layout)
        for layout in ("tp2", "pp2", "cp2_full", "dp2_overlap_target_groups", "tp2_sp_pp2_full")
    ),
    *(
        ("qwen3_equal", "logprobs", layout)
        for layout in ("packed", "tp2_sp_packed", "pp2_vpp2_full")
    ),
    ("llama_tied_deeper", "logprobs_and_head", "tp2_pp2"),
    ("moe", "logprobs", "ep2_pp2"),
    *(("moe", "reverse_kl", layout) for layout in ("ep2_pp2", "tp2_sp_etp1_ep2")),
    *(
        ("bridge", "default", layout)
        for layout in (
            "target_groups",
            "tp2_sp_packed",
            "pp2_vpp2_target_groups",
            "pp2_full_block",
            "tp2_sp_pp2_full",
            "cp2_tp2_sp",
            "dp2_pp2",
        )
    ),
    ("bridge", "top_k", "tp2_sp_pp2_full"),
    *(
        ("bridge", "other_tokens_sequence_mean", layout)
        for layout in ("cp2_tp2_sp", "tp2_sp_pp2_full")
    ),
    *(
        (pair, method, layout)
        for pair, method in (("bridge", "trainable_linear"), ("llama_tied_deeper", "trainable_mlp"))
        for layout in (
            "packed",
            "tp2",
            "tp2_sp_full",
            "pp2_vpp2_target_groups",
            "cp2_tp2_sp",
            "dp2_overlap_target_groups",
            "dp2_pp2",
        )
    ),
    *(
        ("llama_tied_deeper", "default", layout)
        for layout in TOGETHER_LAYOUTS
        if "ep2" not in layout
    ),
    *(
        ("llama_tied_deeper", method, layout)
        for method in ("top_k", "other_prompt", SEVERAL)
        for layout in ("packed_together", "pp2_vpp2_together", "cp2_tp2_sp_together")
    ),
    ("qwen3_other_vocabulary", "reverse_kl", "tp2_sp_together"),
    ("qwen3_equal", "other_tokens", "tp2_sp_packed_together"),
    ("qwen3_deeper", FP8[0], "tp2_sp_together"),
    ("llama_tied_deeper", "trainable_mlp", "tp2_sp_together"),
    ("bridge", "default", "cp2_tp2_sp_together"),
    *(("moe", "default", layout) for layout in ("ep2_together", "ep2_pp2_together")),
    ("moe_teacher", "other_tokens_sequence_mean", "ep2_together"),
]
# What carries over from one step to the next (buffers, overlapped gathers, offloaded weights)
# depends on the layout, not on model or method: these have every layout, and take a second step.
TWO_STEPS = {("llama_tied_deeper", "default"), ("moe", "default")} | {
    (pair, method)
    for pair, method, _ in CASES
    if method in (*LOGPROB_METHODS, *PROJECTOR_METHODS, "crossfade")
}


# What other cases of the main run have: these layouts with other pairs, these kinds of loss and
# model in other cases or in tests of their own.
ELSEWHERE = {
    *(
        ("llama_tied_deeper", "default", layout)
        for layout in (
            *("tp2", "tp2_sp_full", "tp2_pp2", "tp2_sp_packed", "pp2_packed_full"),
            *("pp2_vpp2_full", "pp2_vpp2_target_groups"),
        )
    ),
    *(("llama_tied_deeper", method, "tp2_sp_full") for method in ("sampled_token", "forward_kl")),
    *(
        ("llama_tied_deeper", method, "pp2_vpp2_target_groups")
        for method in ("ride", "other_precision")
    ),
    ("qwen3_other_vocabulary", "top_k_reference", "tp2_sp_full"),
    ("qwen3_deeper", FP8[1], "pp2_vpp2_target_groups"),
    *((pair, "default", "tp2_sp_packed") for pair in ("post_norms", "zero_centered_norms")),
    ("shared_expert", "default", "tp2_sp_etp1_ep2"),
    *(("moe", "default", layout) for layout in ("tp2_sp", "pp2_vpp2")),
}
FURTHER: set[tuple[str, ...]] = {
    *(
        (method, layout)
        for method in ("even_last_k_sequence_mean", "token_pre_norm")
        for layout in ("tp2_sp_full", "dp2_pp2")
    ),
    *((method, "tp2_pp2") for method in ("sampled_token", "forward_kl", "top_k_union")),
    *((method, "tp2") for method in FP8),
    *((method, layout) for method in FP8 for layout in ("tp4_sp", "tp2_sp_full")),
    *(("llama_tied_deeper", "logprobs", layout) for layout in ("tp2", "pp2")),
    *(("bridge", "default", layout) for layout in ("tp2_sp_packed", "dp2_pp2")),
    *(("moe_teacher", "default", layout) for layout in ("tp2", "ep2_pp2")),
    ("post_norms", "default", "tp2"),
    (EARLY, "pp2_vpp2"),
    ("shallow_first_teacher", "pp2"),
    *(("gaps", layout) for layout in ("pp2_vpp2_target_groups", "dp2_pp2")),
    *(("gaps_other_tokens", layout) for layout in ("tp2_sp_packed", "cp2_tp2_sp")),
    ("qwen3_other_vocabulary", "reverse_kl", "tp2_pp2"),
    ("moe", "reverse_kl", "ep2_pp2"),
    ("moe_teacher", "other_tokens_sequence_mean", "tp2_sp_etp1_ep2"),
    ("bridge", "other_tokens_sequence_mean", "tp2_sp_pp2_full"),
    *(("bridge", "default", layout) for layout in ("target_groups", "pp2_full_block")),
    *(
        ("windows", "default", layout)
        for layout in ("pp2_selective", "pp2_vpp2_full", "cp2_tp2_sp")
    ),
    *(("without_rope", "default", layout) for layout in ("tp2_sp_full", "pp2_vpp2", "cp2")),
    *(("post_norms", "default", layout) for layout in ("pp2_vpp2_full", "cp2", "tp4_sp")),
    *(("two_ropes", "default", layout) for layout in ("pp2_vpp2_full", "cp2")),
    ("multipliers", "reverse_kl", "pp2_vpp2"),
    *(("softcaps", "reverse_kl", layout) for layout in ("tp2_sp_packed", "pp2_vpp2_full")),
    ("softcaps", "logprobs", "tp2"),
    ("biases", "default", "pp2_vpp2_full"),
    *(("zero_centered_norms", "default", layout) for layout in ("pp2_vpp2_full", "cp2")),
    *(("shared_expert", "default", layout) for layout in ("ep2_pp2_vpp2_full", "tp2_sp_ep2")),
    ("linear_attention", "default", "tp2_pp2"),
    ("linear_attention", FP8[0], "tp2_sp_packed"),
    ("linear_attention_dense", "default", "tp2_sp_packed"),
    *(
        ("linear_attention_student", "default", layout)
        for layout in ("packed", "ep2_pp2_vpp2_full")
    ),
    *(("latent", "default", layout) for layout in ("cp2", "ep2_pp2_vpp2_full")),
    ("latent", FP8[0], "tp2_sp_etp1_ep2"),
    ("sigmoid_router", "default", "tp2_sp_pp2_teacher_etp1_ep2"),
    ("sigmoid_router_student", "default", "ep2_pp2"),
    *(("sigmoids_and_wide_norms", "default", layout) for layout in ("ep2_pp2", "tp2_sp_ep2")),
    ("post_norms", FP8[0], "tp2_sp_full"),
    ("sigmoid_router", FP8[0], "tp2_sp_etp1_ep2"),
    *(
        (method, "cp2_tp2_sp")
        for method in ("jsd", "other_prompt", SEVERAL, *FP8, *PROJECTOR_METHODS)
    ),
    # Settings that tests/training/test_plain_pytorch.py has on one rank.
    *((method, "tp2_sp_pp2_full") for method in ("even_last_k_sequence_mean", "token_pre_norm")),
    *(
        (method, "cp2_pp2_vpp2")
        for method in ("sampled_token", "forward_kl", "reverse_kl", "top_k_union")
    ),
    *((method, "cp2_tp2_sp") for method in ("top_k", "other_tokens")),
    *(("gaps", layout) for layout in ("packed", "tp2_sp_full")),
    *(("llama_tied_deeper", "logprobs", layout) for layout in ("cp2_full", "tp2_sp_pp2_full")),
    ("qwen3_equal", "logprobs", "packed"),
    ("moe_teacher", "other_tokens_sequence_mean", "ep2_pp2"),
    ("moe", "reverse_kl", "tp2_sp_etp1_ep2"),
    ("bridge", "default", "cp2_tp2_sp"),
    ("moe", "default", "mbs1"),
    ("moe_teacher", "default", "tp2_sp_pp2_teacher_etp1_ep2"),
    ("moe_student", "default", "tp2_sp_full"),
    ("moe_teacher", FP8[0], "ep2_pp2"),
    ("moe", "logprobs", "ep2_pp2"),
    ("llama_shallower", "default", "pp2"),
    ("qwen3_equal", "logprobs", "tp2_sp_packed"),
    ("shallow_first_teacher", "tp2_sp_pp2_full"),
    (EARLY, "tp2_sp_full"),
    ("bridge", "default", "tp2_sp_pp2_full"),
    *(
        ("sinks", "default", layout)
        for layout in ("packed", "cp2_full", "ep2_pp2_vpp2_full", "tp2_sp_etp1")
    ),
    ("sinks", FP8[0], "tp2_sp_etp1_ep2"),
}
# Left to the nightly run: the pairs that go through the same layouts as llama_tied_deeper, without
# its second step, and most layouts of some settings (the main run has those that differ most).
NIGHTLY = (
    {
        case
        for case in CASES
        if case[2] in TOGETHER_LAYOUTS
        and case
        not in {
            *(
                ("llama_tied_deeper", "default", layout)
                for layout in ("together", "dp2_together", "cp2_tp2_sp_together")
            ),
            ("llama_tied_deeper", SEVERAL, "pp2_vpp2_together"),
            ("moe", "default", "ep2_together"),
        }
    }
    | {case for case in [*DEFAULTS, *OTHERS] if case[0] != "llama_tied_deeper"}
    | {
        case
        for case in CASES
        if (
            case[1] in ("top_k", "jsd", "other_prompt", "other_tokens", SEVERAL, *PROJECTOR_METHODS)
            and case[2] not in ("pp2_vpp2_target_groups", "cp2_tp2_sp")
        )
        or (
            case[1] in ("crossfade", "ride", "other_precision")
            and case[2] != "pp2_vpp2_target_groups"
        )
        # Further layouts of what the main run has in layouts of the same kinds.
        or case[1:] in FURTHER
        or case in FURTHER
        or case in ELSEWHERE
    }
)
COUNTED = ("llama_tied_deeper", "default")
Case = tuple[str, str, str]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of the cases that this run selected, and of their references."""
    selected = _selected(request)
    root = tmp_path_factory.mktemp("layouts")
    pairs = {
        name: str(save_pair(root / name, **settings))  # type: ignore[arg-type]
        for name, settings in (
            PAIRS
            | SHALLOWER
            | WINDOWS
            | WITHOUT_ROPE
            | POST_NORMS
            | BIASES
            | GEMMA
            | MULTIPLIERS
            | OTHER_VOCABULARY
            | MOE_PAIRS
            | WIDER
        ).items()
    }
    for name in WIDER:
        save_random_bridge(root / f"{name}.bridge", root / name)
        with (root / name / "run.yaml").open("a") as run_file:
            run_file.write(BRIDGED % (root / f"{name}.bridge"))
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    for pair, method in sorted({(pair, method) for pair, method, _ in selected}):
        cases[1].append(
            {
                "name": f"{pair}.{method}.reference",
                "pair": pairs[pair],
                "overrides": [*LINEAR_UPDATES, *_with_folders(METHODS[method], root)],
                "reading": READINGS.get(method),
                "taught_by": TAUGHT_BY.get(method),
                "gaps": method in GAP_METHODS,
                "one_step": (pair, method) not in TWO_STEPS,
            }
        )
    for pair, method, layout in selected:
        ranks, overrides, _ = ALL_LAYOUTS[layout]
        cases[ranks].append(
            {
                "name": f"{pair}.{method}.{layout}",
                "pair": pairs[pair],
                "overrides": [*LINEAR_UPDATES, *_with_folders(METHODS[method], root), *overrides],
                "reading": READINGS.get(method),
                "taught_by": TAUGHT_BY.get(method),
                "gaps": method in GAP_METHODS,
                "logprobs": method in LOGPROB_METHODS,
                "one_step": (pair, method) not in TWO_STEPS,
            }
        )
    for ranks, of_ranks in cases.items():
        run_ranks("step", of_ranks, ranks, root)
    return root


def _selected(request: pytest.FixtureRequest) -> list[Case]:
    """Cases of the selected tests, and those whose micro-batches are counted."""
    wanted = [
        tuple(item.callspec.params.values())
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    ]
    return [case for case in CASES if case in wanted or case[:2] == COUNTED]


def _with_folders(overrides: list[str], root: Path) -> list[str]:
    return [override.replace("TEACHERS", str(root)) for override in overrides]


@pytest.mark.parametrize(
    ("pair", "method", "layout"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case in NIGHTLY)) for case in CASES],
)
def test_layout_changes_nothing(results: Path, pair: str, method: str, layout: str) -> None:
    reference = torch.load(results / f"{pair}.{method}.reference.pt")
    found = torch.load(results / f"{pair}.{method}.{layout}.pt")
    if layout in TOGETHER_LAYOUTS:
        assert found["num_teacher_batches"] < found["num_micro_batches"]
    for name in ("loss", "output_loss", "grad_norm", "second_loss"):
        assert_close_relative(found[name], reference[name], 1e-5, what=name)
    for one, expected in zip(found["extra_teachers"], reference["extra_teachers"], strict=True):
        assert_close_relative(one[0], expected[0], 1e-5)
        assert_close_relative(one[1], expected[1], 1e-6, size=1.0)
    assert_close_relative(found["cosine"], reference["cosine"], 1e-6, size=1.0)
    if ALL_LAYOUTS[layout][2]:
        _assert_same_tensors(found["gradients"], reference["gradients"])
        _assert_same_tensors(found["projector_gradients"], reference["projector_gradients"])
    _assert_same_tensors(found["weights"], reference["weights"])
    assert bool(found["projectors"]) == (method in PROJECTOR_METHODS)
    for name, tensor in reference["initial_projectors"].items():
        assert torch.equal(found["initial_projectors"][name], tensor), name
    _assert_same_tensors(found["projectors"], reference["projectors"])


@pytest.mark.parametrize(
    ("pair", "method", "layout"), [case for case in CASES if case[1] in LOGPROB_METHODS]
)
def test_logprobs_are_those_of_transformers(
    results: Path, pair: str, method: str, layout: str
) -> None:
    """Of all response tokens, by the whole student, before the first step and after the second."""
    found = torch.load(results / f"{pair}.{method}.{layout}.pt")
    model = AutoModelForCausalLM.from_pretrained(
        results / pair / "student", dtype=torch.float32
    ).eval()
    before = _logprobs(model)
    assert_close_relative(found["logprobs"][0], before, 1e-5)
    destinations = checkpoint_tensors(model)
    for name, value in found["weights"].items():
        destinations[name].copy_(value)
    after = _logprobs(model)
    assert float((after - before).abs().max()) > 1e-3 * float(before.abs().max())
    assert_close_relative(found["logprobs"][1], after, 1e-5)


def _logprobs(model: torch.nn.Module) -> torch.Tensor:
    found = []
    for prompt, response in zip(*fixed_rollouts(), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(logprobs.gather(1, torch.tensor(response)[:, None]).squeeze(1))
    return torch.cat(found)


def test_cases_differ_in_micro_batches(results: Path) -> None:
    """The micro-batch settings do what they say, or the comparison would compare nothing."""
    found = {
        layout: torch.load(results / f"llama_tied_deeper.default.{layout}.pt")
        for layout in ("reference", "mbs1", "token_budget", "selective", "dp2_pp2", "together")
    }
    counts = {layout: one["num_micro_batches"] for layout, one in found.items()}
    assert counts["reference"] == 1
    assert counts["mbs1"] == 8
    assert 1 < counts["token_budget"] < 8
    assert counts["selective"] == 4
    assert counts["dp2_pp2"] == 4
    of_teacher = {layout: one["num_teacher_batches"] for layout, one in found.items()}
    assert counts["together"] == of_teacher["mbs1"] == 8
    assert 1 < of_teacher["together"] < 8


def _assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Kernels alone make 2.4e-6 of it; a lost share of a gradient is 1e-1 of it and more.
        assert_close_relative(found[name], tensor, 5e-5, what=name)
