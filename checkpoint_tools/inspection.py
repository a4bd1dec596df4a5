"""Counts a checkpoint's parameters by part, tensors by pattern, and a layout's shares."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.families import mapping_table
from megatron_oprd.models.layout_checks import check_layout
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights.accounting import HEAD
from megatron_oprd.weights.megatron_keys import EMBEDDING, layer_of
from megatron_oprd.weights.source import WeightSource
from megatron_oprd.weights.torch_dist_plan import stage_of_layers

# Part of a tensor by its name. The first match counts, so norms go before attention.
_PARTS = (
    ("embedding", r"embed_tokens\."),
    ("LM head", r"^lm_head\."),
    ("norms", r"norm\."),
    ("attention", r"\.(self_attn|attention)\."),
    ("experts", r"\.experts\."),
    ("router", r"\.(mlp|block_sparse_moe)\.(gate|router)\."),
    ("MLP", r"\.mlp\."),
)

# Configuration fields for the experts of a layer, and for the experts of a token.
_EXPERTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    "num_routed_experts",
)  # fmt: skip
_CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k",
    "moe_top_k", "top_k_experts",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a model."""

    name: str  # a name in `_PARTS`, or "other"
    num_tensors: int
    parameters: int | None  # None if packed, with several values per number
    active: int | None  # used by one token; None if unknown
    num_bytes: int  # in the checkpoint


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensors whose names differ only in numbers."""

    pattern: str  # such as model.layers.{0-29}.mlp.up_proj.weight
    shape: tuple[int, ...]  # of each tensor
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """The weights of each rank at one pipeline rank of a layout."""

    pp_rank: int
    layers: list[int]  # from 0, chunk by chunk
    parameters: int  # of one rank; equal for all tensor- and expert-parallel ranks
    num_bytes: int  # in the checkpoint's dtypes


def expert_counts(config: dict[str, Any]) -> tuple[int, int] | None:
    """(experts per layer, experts per token) of any family; None if not found."""
    # Multimodal and some mixture-of-experts configurations nest these fields.
    for level in (config, config.get("text_config") or {}, config.get("ffn_config") or {}):
        counts = [
            next((level[name] for name in names if level.get(name)), None)
            for names in (_EXPERTS, _CHOSEN)
        ]
        experts, chosen = counts
        if isinstance(experts, int) and isinstance(chosen, int):
            return experts, chosen
    return None


def parts(source: WeightSource, *, tied: bool) -> list[Part]:
    """Counts a checkpoint's parameters by part, for any architecture; reads no weights.

    With ``tied``, a stored LM head is a copy and counts as bytes but not as parameters.
    """
    counts = expert_counts(source.config)
    unknown: dict[str, set[str]] = {"parameters": set(), "active": set()}
    sums: dict[str, list[int]] = {name: [0, 0, 0, 0] for name, _ in _PARTS} | {"other": [0] * 4}
    for name in source.names():
        part = next((part for part, pattern in _PARTS if re.search(pattern, name)), "other")
        values = math.prod(source.shape(name))
        is_copy = tied and name == HEAD
        parameters = 0 if is_copy else values
        active = parameters
        if part == "experts":
            if counts is None:
                unknown["active"].add(part)
            else:
                active = parameters * counts[1] // counts[0]
        # Quantised weights pack several values into an integer.
        if not source.dtype(name).is_floating_point:
            unknown["parameters"].add(part)
            unknown["active"].add(part)
        of_name = (1, parameters, active, values * source.dtype(name).itemsize)
        sums[part] = [a + b for a, b in zip(sums[part], of_name, strict=True)]
    return [
        Part(
            name=name,
            num_tensors=count,
            parameters=None if name in unknown["parameters"] else values,
            active=None if name in unknown["active"] else active,
            num_bytes=size,
        )
        for name, (count, values, active, size) in sums.items()
        if count
    ]


def tensor_groups(source: WeightSource) -> list[TensorGroup]:
    """Groups a checkpoint's tensors by pattern, in their order."""
    numbers: dict[tuple[str, tuple[int, ...], torch.dtype], list[list[int]]] = {}
    for name in source.names():
        key = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name), source.shape(name), source.dtype(name)
        found = [int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", name)]
        numbers.setdefault(key, []).append(found)
    return [
        TensorGroup(
            pattern=pattern.format(*map(_ranges, zip(*found, strict=True))),
            shape=shape,
            dtype=dtype,
            count=len(found),
        )
        for (pattern, shape, dtype), found in numbers.items()
    ]


def shares(
    architecture: Architecture,
    source: WeightSource,
    layout: ParallelLayout,
    *,
    virtual_stages: int = 1,  # model chunks per pipeline rank
    padded_vocab_size: int,
) -> list[Share]:
    """Computes the weights at each pipeline rank of a layout.

    ``source`` gives the dtypes. Raises `UserError` if the layout does not divide the model.
    """
    pp = layout.pipeline_model_parallel_size
    check_layout(architecture, layout, model=str(source.folder))
    if virtual_stages > 1 and pp * virtual_stages > architecture.num_layers:
        raise UserError(
            f"--pipeline-model-parallel-size {pp} x --virtual-pipeline-model-parallel-size "
            f"{virtual_stages} is more than the {architecture.num_layers} layers of "
            f"{source.folder}; give sizes whose product is at most that."
        )
    stages = stage_of_layers(architecture.num_layers, pp * virtual_stages)
    parameters, num_bytes = [0] * pp, [0] * pp
    for mapping in mapping_table(architecture, padded_vocab_size=padded_vocab_size):
        layer = layer_of(mapping)
        if layer is not None:
            stage = stages[layer]
        else:
            stage = 0 if mapping.megatron == EMBEDDING else stages[-1]
        try:
            if not mapping.is_held_at(layout):
                continue
            values = math.prod(mapping.local_shape(mapping.split_at(layout)[1]))
        except ValueError as error:
            raise UserError(f"the layout does not fit the model: {error}.") from None
        dtype = source.dtype(next(iter(mapping.hf)))
        # Virtual stages go round the pipeline ranks.
        parameters[stage % pp] += values
        num_bytes[stage % pp] += values * dtype.itemsize
    return [
        Share(
            pp_rank=rank,
            layers=[layer for layer, stage in enumerate(stages) if stage % pp == rank],
            parameters=parameters[rank],
            num_bytes=num_bytes[rank],
        )
        for rank in range(pp)
    ]


def ranges(numbers: Iterable[int]) -> str:
    """Formats numbers in any order as ranges: 0-3,5 for 0, 1, 2, 3 and 5."""
    ordered = sorted(set(numbers))
    runs: list[Sequence[int]] = []
    # Number minus index is constant along a run.
    for _, run in itertools.groupby(enumerate(ordered), key=lambda item: item[1] - item[0]):
        runs.append([number for _, number in run])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _ranges(numbers: Iterable[int]) -> str:
    text = ranges(numbers)
    return text if text.isdigit() else f"{{{text}}}"
