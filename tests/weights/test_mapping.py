import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.families import FAMILIES, mapping_table
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights.mapping import (
    QKV,
    ColumnSplit,
    Copy,
    GatedMLP,
    GroupedRows,
    Mapping,
    RowSplit,
    Vocabulary,
)
from tests.helpers.tiny import tiny_config

SIZES = (1, 2, 4)
HIDDEN = 6


def qkv(heads: int, groups: int, dim: int, *, bias: bool = False) -> QKV:
    trailing = () if bias else (HIDDEN,)
    rows = {"q": heads * dim, "k": groups * dim, "v": groups * dim}
    return QKV(
        megatron="qkv",
        hf={name: (count, *trailing) for name, count in rows.items()},
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=dim,
    )


def gated_qkv(heads: int, groups: int, dim: int) -> QKV:
    rows = {"q": 2 * heads * dim, "k": groups * dim, "v": groups * dim}
    return QKV(
        megatron="qkv",
        hf={name: (count, HIDDEN) for name, count in rows.items()},
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=dim,
        has_gate=True,
    )


def fused(mapping: QKV | GatedMLP) -> Mapping:
    """The same parameter, made of one tensor that holds all of ``mapping``'s below one another."""
    shapes = list(mapping.hf.values())
    rows = sum(shape[0] for shape in shapes)
    return dataclasses.replace(mapping, hf={"fused": (rows, *shapes[0][1:])})


def vocabulary(size: int, padded: int) -> Vocabulary:
    return Vocabulary(megatron="embedding", hf={"e": (size, HIDDEN)}, padded_vocab_size=padded)


# (query heads, groups): ratios 1, 2 and 4, then one group for all heads, and fewer groups than 4
# ranks, where a rank's rows begin inside a group.
HEADS = [(4, 4), (8, 4), (16, 4), (4, 1), (8, 2)]
# (rows, padded rows): odd sizes, one that fills the last rank, and one where, of 4 ranks, the third
# has padding in part and the fourth nothing else.
VOCABULARIES = [(97, 100), (97, 128), (16, 16), (9, 16), (5, 8)]
GATED = GatedMLP(megatron="fc1", hf={"gate": (12, HIDDEN), "up": (12, HIDDEN)})
ROW_SPLIT = RowSplit(megatron="fc2", hf={"down": (HIDDEN, 12)})
SPLIT = ColumnSplit(megatron="sinks", hf={"s": (8,)})
GROUPED = GroupedRows(
    megatron="conv", hf={"c": (4 * 9, 1, 3)}, num_groups=4, rows_of_group=(2, 2, 5)
)
ALL_KINDS: dict[str, Mapping] = {
    "copy": Copy(megatron="norm", hf={"n": (HIDDEN,)}),
    "copy_matrix": Copy(megatron="router", hf={"r": (3, HIDDEN)}),
    "row_split": ROW_SPLIT,
    "column_split": ColumnSplit(megatron="up", hf={"up": (12, HIDDEN)}),
    "column_split_of_numbers": SPLIT,
    "gated_mlp": GATED,
    **{f"vocabulary_{n}_{padded}": vocabulary(n, padded) for n, padded in VOCABULARIES},
    **{f"qkv_{heads}_{groups}": qkv(heads, groups, 4) for heads, groups in HEADS},
    **{f"qkv_bias_{heads}_{groups}": qkv(heads, groups, 4, bias=True) for heads, groups in HEADS},
    "fused_gated_mlp": fused(GATED),
    **{f"gated_qkv_{heads}_{groups}": gated_qkv(heads, groups, 4) for heads, groups in HEADS},
    "grouped_rows": GROUPED,
    # Two parts in the first tensor, one in the second.
    "grouped_rows_of_two": GroupedRows(
        megatron="in_proj",
        hf={"qk": (4 * 4, HIDDEN), "z": (4 * 5, HIDDEN)},
        num_groups=4,
        rows_of_group=(1, 3, 5),
    ),
    **{f"fused_qkv_{heads}_{groups}": fused(qkv(heads, groups, 4)) for heads, groups in HEADS},
}


def numbered(mapping: Mapping) -> dict[str, Tensor]:
    """Hugging Face tensors in which no value comes twice, and none is 0."""
    tensors, start = {}, 1
    for name, shape in mapping.hf.items():
        count = math.prod(shape)
        tensors[name] = torch.arange(start, start + count, dtype=torch.float64).reshape(shape)
        start += count
    return tensors


def to_shards(mapping: Mapping, tensors: dict[str, Tensor], tp_size: int) -> list[Tensor]:
    """Each rank's parameter, as loading fills it."""
    shards = []
    for tp_rank in range(tp_size):
        shard = torch.full(mapping.local_shape(tp_size), math.nan, dtype=torch.float64)
        for piece in mapping.pieces(tp_rank, tp_size):
            shard[piece.local_index] = 0 if piece.hf is None else tensors[piece.hf][piece.hf_index]
        shards.append(shard)
    return shards


def to_hf(mapping: Mapping, shards: Sequence[Tensor]) -> dict[str, Tensor]:
    """The Hugging Face tensors, as export fills them."""
    tensors = {
        name: torch.full(shape, math.nan, dtype=torch.float64) for name, shape in mapping.hf.items()
    }
    for tp_rank, shard in enumerate(shards):
        for piece in mapping.pieces(tp_rank, len(shards)):
            if piece.hf is not None:
                tensors[piece.hf][piece.hf_index] = shard[piece.local_index]
    return tensors


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("mapping", ALL_KINDS.values(), ids=ALL_KINDS)
def test_pieces_tile_both_sides_once(mapping: Mapping, tp_size: int) -> None:
    in_hf = {name: torch.zeros(shape) for name, shape in mapping.hf.items()}
    for tp_rank in range(tp_size):
        in_shard = torch.zeros(mapping.local_shape(tp_size))
        for piece in mapping.pieces(tp_rank, tp_size):
            in_shard[piece.local_index] += 1
            if piece.hf is not None:
                in_hf[piece.hf][piece.hf_index] += 1
                assert in_hf[piece.hf][piece.hf_index].shape == in_shard[piece.local_index].shape, (
                    "both sides of a piece have one shape"
                )
        assert torch.equal(in_shard, torch.ones_like(in_shard))
    copies = tp_size if mapping.is_replicated else 1
    for count in in_hf.values():
        assert torch.equal(count, torch.full_like(count, copies))
    assert mapping.is_replicated == isinstance(mapping, Copy)


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_qkv_is_interleaved_by_group(heads: int, groups: int, bias: bool, tp_size: int) -> None:
    dim = 4
    mapping = qkv(heads, groups, dim, bias=bias)
    tensors = numbered(mapping)
    trailing = tensors["q"].shape[1:]
    # [rows, h] --> [groups, rows of a group, h]
    q, k, v = (tensors[name].reshape(groups, -1, *trailing) for name in "qkv")
    whole = torch.cat([q, k, v], dim=1).reshape(-1, *trailing)
    shards = to_shards(mapping, tensors, tp_size)
    for shard, expected in zip(shards, whole.chunk(tp_size), strict=True):
        assert torch.equal(shard, expected)


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_gates_are_behind_the_queries_of_their_group(heads: int, groups: int, tp_size: int) -> None:
    mapping = gated_qkv(heads, groups, 4)
    tensors = numbered(mapping)
    # [heads * (query, gate), h] --> [groups, heads of a group, query or gate, dim, h]
    q = tensors["q"].reshape(groups, heads // groups, 2, 4, HIDDEN)
    query, gate = (q[:, :, which].reshape(groups, -1, HIDDEN) for which in (0, 1))
    k, v = (tensors[name].reshape(groups, 4, HIDDEN) for name in "kv")
    whole = torch.cat([query, gate, k, v], dim=1).reshape(-1, HIDDEN)
    shards = to_shards(mapping, tensors, tp_size)
    for shard, expected in zip(shards, whole.chunk(tp_size), strict=True):
        assert torch.equal(shard, expected)


@pytest.mark.parametrize("tp_size", SIZES)
def test_grouped_rows_have_all_parts_of_a_group(tp_size: int) -> None:
    tensors = numbered(GROUPED)
    parts = [part.reshape(4, -1, 1, 3) for part in tensors["c"].split([8, 8, 20])]
    whole = torch.cat(parts, dim=1).reshape(-1, 1, 3)
    for shard, expected in zip(
        to_shards(GROUPED, tensors, tp_size), whole.chunk(tp_size), strict=True
    ):
        assert torch.equal(shard, expected)


@pytest.mark.parametrize("tp_size", SIZES)
def test_gated_mlp_stacks_each_ranks_gate_and_up(tp_size: int) -> None:
    tensors = numbered(GATED)
    gates, ups = tensors["gate"].chunk(tp_size), tensors["up"].chunk(tp_size)
    for rank, shard in enumerate(to_shards(GATED, tensors, tp_size)):
        assert torch.equal(shard, torch.cat([gates[rank], ups[rank]]))


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize(
    "mapping",
    [GATED, *(qkv(*heads, 4) for heads in HEADS), *(qkv(*heads, 4, bias=True) for heads in HEADS)],
)
def test_one_tensor_in_place_of_several(mapping: QKV | GatedMLP, tp_size: int) -> None:
    tensors = numbered(mapping)
    together = {"fused": torch.cat(list(tensors.values()))}
    expected = to_shards(mapping, tensors, tp_size)
    shards = to_shards(fused(mapping), together, tp_size)
    for shard, of_several in zip(shards, expected, strict=True):
        assert torch.equal(shard, of_several)
    assert torch.equal(to_hf(fused(mapping), shards)["fused"], together["fused"])


@pytest.mark.parametrize("tp_size", SIZES)
def test_row_split_splits_columns(tp_size: int) -> None:
    tensors = numbered(ROW_SPLIT)
    shards = to_shards(ROW_SPLIT, tensors, tp_size)
    assert torch.equal(torch.cat(shards, dim=1), tensors["down"])
    assert len({shard.shape for shard in shards}) == 1


@pytest.mark.parametrize("tp_size", SIZES)
def test_split_gives_each_rank_its_rows(tp_size: int) -> None:
    tensors = numbered(SPLIT)
    assert torch.equal(torch.cat(to_shards(SPLIT, tensors, tp_size)), tensors["s"])
    (piece,) = SPLIT.pieces(tp_size - 1, tp_size)
    assert piece.hf_index == (slice(8 - 8 // tp_size, 8),)


def test_neighbours_in_one_tensor_are_one_piece() -> None:
    """So that an expert stored as one tensor is read once."""
    assert len(fused(GATED).pieces(0, 1)) == 1
    assert len(fused(GATED).pieces(1, 2)) == len(GATED.pieces(0, 1)) == 2


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize(("size", "padded"), VOCABULARIES)
def test_vocabulary_is_padded_with_zeros(size: int, padded: int, tp_size: int) -> None:
    mapping = vocabulary(size, padded)
    tensors = numbered(mapping)
    whole = F.pad(tensors["e"], (0, 0, 0, padded - size))
    for shard, expected in zip(
        to_shards(mapping, tensors, tp_size), whole.chunk(tp_size), strict=True
    ):
        assert torch.equal(shard, expected)


@pytest.mark.parametrize(
    "mapping",
    [ROW_SPLIT, GATED, fused(GATED), vocabulary(97, 100), qkv(4, 2, 4), fused(qkv(4, 2, 4))],
    ids=["row_split", "gated_mlp", "fused_gated_mlp", "vocabulary", "qkv", "fused_qkv"],
)
def test_ranks_that_do_not_divide_raise(mapping: Mapping) -> None:
    # 12 columns, 12 rows twice, 100 rows, 32 rows twice
    with pytest.raises(ValueError, match=rf"{mapping.megatron}: \d+ rows or columns .* 7 ranks"):
        mapping.pieces(0, 7)
    with pytest.raises(ValueError, match="do not divide into 7 ranks"):
        mapping.local_shape(7)


def architecture(family: str, *, tied: bool) -> Architecture:
    (own,) = (one for one in FAMILIES.values() if one.model_type == family)
    return own.architecture(tiny_config(family, tie_word_embeddings=tied), "config.json")


def parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The tensors that a table has for one in files: GPT-OSS's experts one by one."""
    if not re.search(r"mlp\.experts\.(gate_up|down)_proj(_bias)?$", name):
        return [(name, tensor)]
    of_experts = []
    for number, one in enumerate(tensor):
        # Gate and up take turns in the last dimension.
        halves = [one[..., 0::2], one[..., 1::2]] if "gate_up" in name else [one]
        rows = torch.cat([half.t() if half.dim() == 2 else half for half in halves])
        of_experts.append((f"{name}[{number}]", rows))
    return of_experts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [family.model_type for family in FAMILIES.values()])
def test_a_table_has_every_tensor_of_transformers_model(family: str, tied: bool) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(family, tie_word_embeddings=tied))
    # As transformers writes them: it fuses experts in its models, not in its checkpoints.
    written = revert_weight_conversion(model, model.state_dict())
    tensors = {
        part: value.double() for name, one in written.items() for part, value in parts(name, one)
    }
    if tied:
        assert torch.equal(tensors.pop("lm_head.weight"), tensors["model.embed_tokens.weight"])
    table = mapping_table(architecture(family, tied=tied), padded_vocab_size=104)

    shapes = {name: shape for mapping in table for name, shape in mapping.hf.items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert set(Counter(name for mapping in table for name in mapping.hf).values()) == {1}
    assert set(Counter(mapping.megatron for mapping in table).values()) == {1}
    for tp_size in SIZES:
        for mapping in table:
            shards = to_shards(mapping, tensors, tp_size)
            assert not any(shard.isnan().any() for shard in shards)
            for name, tensor in to_hf(mapping, shards).items():
                assert torch.equal(tensor, tensors[name]), f"{name} at {tp_size} ranks"


@pytest.mark.parametrize("ep_size", [1, 2, 4, 8])
def test_experts_are_dealt_out_in_runs(ep_size: int) -> None:
    table = mapping_table(architecture("qwen3_moe", tied=False), padded_vocab_size=104)
    layer = [m for m in table if m.megatron.startswith("decoder.layers.3.")]
    places = [
        ParallelLayout(ep_rank=rank, expert_model_parallel_size=ep_size) for rank in range(ep_size)
    ]
    held = [
        [m.expert for m in layer if m.is_held_at(place) and m.expert is not None]
        for place in places
    ]
    # Two matrices each, one run of experts after the other.
    assert [expert for of_rank in held for expert in of_rank] == [i // 2 for i in range(16)]
    assert {len(of_rank) for of_rank in held} == {16 // ep_size}
    others = [m for m in layer if m.expert is None]
    assert {m.megatron.removeprefix("decoder.layers.3.") for m in others} == {
        "mlp.router.weight",
        "pre_mlp_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "self_attention.linear_proj.weight",
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight",
    }
    assert all(m.is_held_at(place) for m in others for place in places)


def test_experts_have_a_tensor_parallel_group_of_their_own() -> None:
    place = ParallelLayout(
        tensor_model_parallel_size=4,
        expert_tensor_parallel_size=2,
        expert_model_parallel_size=2,
        tp_rank=3,
        etp_rank=1,
    )
    for mapping in mapping_table(architecture("qwen3_moe", tied=False), padded_vocab_size=104):
        assert mapping.split_at(place) == ((3, 4) if mapping.expert is None else (1, 2))
        if mapping.expert is not None:
            assert f".experts.{mapping.expert}." in mapping.megatron
            assert all(f".experts.{mapping.expert}." in name for name in mapping.hf)


def test_experts_that_do_not_divide_raise() -> None:
    table = mapping_table(architecture("qwen3_moe", tied=False), padded_vocab_size=104)
    expert = next(m for m in table if m.expert is not None)
    with pytest.raises(ValueError, match=r"experts\.0\..*: 8 experts do not divide into 3 ranks"):
        expert.is_held_at(ParallelLayout(expert_model_parallel_size=3))
