"""`test_torch_dist_layouts` compares chunks with those that Megatron itself cuts."""

from collections import Counter
from math import prod

import pytest
import torch

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture, MixtureOfExperts, Rope
from megatron_oprd.models.families import mapping_table
from megatron_oprd.weights.mapping import Mapping
from megatron_oprd.weights.torch_dist_plan import (
    ParallelLayout,
    chunk_name,
    plan_files,
    stage_of_layers,
)

EXPERTS = MixtureOfExperts(
    num_experts=4, num_experts_per_token=2, ffn_hidden_size=16, norm_topk_prob=True
)


def table(moe: MixtureOfExperts | None = None) -> list[Mapping]:
    architecture = Architecture(
        family="Qwen2ForCausalLM" if moe is None else "Qwen3MoeForCausalLM",
        num_layers=5,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=16,
        vocab_size=97,
        layernorm_epsilon=1e-6,
        rope=Rope(theta=1e4),
        tied=False,
        qkv_bias=moe is None,
        qk_norm=moe is not None,
        max_position_embeddings=64,
        moe=moe,
    )
    return mapping_table(architecture, padded_vocab_size=128)


def dtypes(mappings: list[Mapping], **others: torch.dtype) -> dict[str, torch.dtype]:
    return {mapping.megatron: torch.bfloat16 for mapping in mappings} | others


@pytest.mark.parametrize("moe", [None, EXPERTS])
@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=3),
        ParallelLayout(tensor_model_parallel_size=4, expert_model_parallel_size=2),
        ParallelLayout(expert_model_parallel_size=4, expert_tensor_parallel_size=2),
    ],
)
def test_chunks_make_up_every_tensor(moe: MixtureOfExperts | None, layout: ParallelLayout) -> None:
    mappings = table(moe)
    files = plan_files(mappings, layout=layout, dtypes=dtypes(mappings), max_file_bytes=5000)
    covered: dict[str, torch.Tensor] = {}
    for file in files:
        for chunk in file.chunks:
            count = covered.setdefault(chunk.key, torch.zeros(chunk.global_shape))
            place = tuple(
                slice(start, start + size)
                for start, size in zip(chunk.starts, chunk.shape, strict=True)
            )
            count[place] += 1
    assert all(bool((count == 1).all()) for count in covered.values())
    assert sum(count.numel() for count in covered.values()) == sum(
        prod(mapping.local_shape(1)) for mapping in mappings
    )


def test_a_file_holds_chunks_of_one_rank_up_to_its_size() -> None:
    mappings = table(EXPERTS)
    layout = ParallelLayout(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, expert_model_parallel_size=2
    )
    limit = 6000
    files = plan_files(mappings, layout=layout, dtypes=dtypes(mappings), max_file_bytes=limit)
    assert all(file.num_bytes <= limit or len(file.chunks) == 1 for file in files)
    for file in files:
        stages = set()
        experts = set()
        for chunk in file.chunks:
            if chunk.slot.index:
                stages.add(chunk.slot.index[0] >= 3)
            expert = chunk.mapping.expert
            experts.add(None if expert is None else expert // 2)
        assert len(stages) <= 1
        assert len(experts) == 1
    small = plan_files(mappings, layout=ParallelLayout(), dtypes=dtypes(mappings))
    assert len(small) == 2  # the experts' ranks are not the other parameters'


def test_the_widest_dtype_of_a_stacked_tensor_counts() -> None:
    mappings = table()
    name = "decoder.layers.{}.self_attention.linear_qkv.layer_norm_weight"
    stored = dtypes(mappings, **{name.format(2): torch.float32})
    files = plan_files(mappings, layout=ParallelLayout(), dtypes=stored)
    found = Counter(
        (chunk.dtype, "layer_norm" in chunk.key and "qkv" in chunk.key)
        for file in files
        for chunk in file.chunks
    )
    assert found[torch.float32, True] == 5
    assert found[torch.float32, False] == 0


def test_empty_objects_go_with_their_layers() -> None:
    mappings = table(EXPERTS)
    layout = ParallelLayout(tensor_model_parallel_size=2)
    files = plan_files(mappings, layout=layout, dtypes=dtypes(mappings), max_file_bytes=6000)
    objects = [name for file in files for name in file.objects]
    assert len(objects) == len(set(objects))
    assert "decoder.layers.self_attention.linear_qkv._extra_state/shard_3_5" in objects
    assert "decoder.layers.mlp.experts.experts.linear_fc2._extra_state/shard_3.2_5.4" in objects
    assert "decoder.final_layernorm._extra_state/shard_0_1" in objects
    assert not [name for name in objects if "embedding" in name or "output" in name]
    assert not [name for name in objects if "router" in name]
    for file in files:
        modules = {chunk.key.rpartition(".")[0] for chunk in file.chunks}
        assert {name.partition("._extra")[0] for name in file.objects} <= modules


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ParallelLayout(tensor_model_parallel_size=3), "do not divide into 3 ranks"),
        (ParallelLayout(expert_model_parallel_size=3), "4 experts do not divide into 3 ranks"),
        (ParallelLayout(expert_tensor_parallel_size=3), "linear_fc1.* do not divide into 3"),
        (ParallelLayout(pipeline_model_parallel_size=6), "-size 6 .* 5 layers"),
    ],
)
def test_a_layout_that_does_not_fit(layout: ParallelLayout, message: str) -> None:
    mappings = table(EXPERTS)
    with pytest.raises(UserError, match=message):
        plan_files(mappings, layout=layout, dtypes=dtypes(mappings))


def test_uneven_stages() -> None:
    assert stage_of_layers(5, 3) == [0, 0, 1, 1, 2]
    assert stage_of_layers(4, 4) == [0, 1, 2, 3]
    assert stage_of_layers(4, 1) == [0, 0, 0, 0]


def test_names_of_chunks() -> None:
    assert chunk_name("a.weight", (3, 0, 128)) == "a.weight[3,0,128]"
