"""Divides a model's weights into the chunks and files of a `torch_dist` checkpoint.

Any layout loads any checkpoint. The chunks are those that the ranks of the chosen layout would
write, so a run of this layout loads whole chunks. Each file has chunks of one rank only.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from megatron_oprd.errors import UserError
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights.mapping import Mapping as WeightMapping
from megatron_oprd.weights.megatron_keys import (
    EMBEDDING,
    OUTPUT_LAYER,
    Slot,
    is_gated,
    layer_of,
    num_layers,
    written_slots,
)
from megatron_oprd.weights.positioned_reads import Bounds, shape_of

MAX_FILE_BYTES = 10**9


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A chunk of a global tensor."""

    mapping: WeightMapping
    bounds: Bounds  # rectangle of the whole, unsplit parameter
    slot: Slot  # position of the parameter in the global tensor
    dtype: torch.dtype  # of the global tensor

    @property
    def key(self) -> str:
        """The global tensor's name."""
        return self.slot.key

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The global tensor's shape."""
        return (*self.slot.counts, *self.mapping.local_shape(1))

    @property
    def starts(self) -> tuple[int, ...]:
        """The position of the chunk's first element in the global tensor."""
        return (*self.slot.index, *(start for start, _ in self.bounds))

    @property
    def shape(self) -> tuple[int, ...]:
        """The chunk's shape, with size 1 in the dimensions of layers and experts."""
        return (*(1 for _ in self.slot.index), *shape_of(self.bounds))

    @property
    def name(self) -> str:
        """The chunk's name in messages and manifests."""
        return chunk_name(self.key, self.starts)

    @property
    def num_bytes(self) -> int:
        """The size of its values."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of the checkpoint: chunks, and names of empty objects."""

    chunks: list[Chunk] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """The size of the chunks' values."""
        return sum(chunk.num_bytes for chunk in self.chunks)


def chunk_name(key: str, starts: Sequence[int]) -> str:
    """Names a chunk in messages and manifests: tensor[first element]."""
    return f"{key}[{','.join(map(str, starts))}]"


def plan_files(
    table: Sequence[WeightMapping],
    *,
    layout: ParallelLayout,
    dtypes: Mapping[str, torch.dtype],
    max_file_bytes: int = MAX_FILE_BYTES,  # beyond it, a new file is begun
) -> list[File]:
    """Divides a model into chunks and files; `UserError` if the layout does not divide the model.

    ``dtypes`` are by Megatron name; a global tensor takes the widest of its parameters.
    """
    stages = stage_of_layers(num_layers(table), layout.pipeline_model_parallel_size)
    placed = list(zip(table, written_slots(table), strict=True))
    stored: dict[str, torch.dtype] = {}
    for mapping, slot in placed:
        dtype = dtypes[mapping.megatron]
        stored[slot.key] = torch.promote_types(stored.get(slot.key, dtype), dtype)

    by_rank: dict[tuple[int, int, int], list[Chunk]] = {}
    for mapping, slot in placed:
        stage = _stage(mapping, stages)
        try:
            ep_rank = mapping.expert_rank(layout.expert_model_parallel_size)
            cuts = _cuts(mapping, layout)
        except ValueError as error:
            raise UserError(f"the layout does not fit the model: {error}.") from None
        for tp_rank, bounds in cuts:
            # (stage, expert-parallel rank or -1, tensor-parallel rank)
            rank = (stage, -1 if ep_rank is None else ep_rank, tp_rank)
            chunk = Chunk(mapping=mapping, bounds=bounds, slot=slot, dtype=stored[slot.key])
            by_rank.setdefault(rank, []).append(chunk)

    files: list[File] = []
    for rank in sorted(by_rank):
        size = max_file_bytes  # a rank begins with a file of its own
        for chunk in by_rank[rank]:
            if size + chunk.num_bytes > max_file_bytes:
                files.append(File())
                size = 0
            files[-1].chunks.append(chunk)
            size += chunk.num_bytes
    for file in files:
        file.objects.extend(_extra_states(file.chunks))
    return files


def stage_of_layers(layers: int, stages: int) -> list[int]:
    """The pipeline stage of each layer; `UserError` if there are more stages than layers."""
    if stages > layers:
        raise UserError(
            f"--pipeline-model-parallel-size {stages} is more than the model's {layers} layers; "
            "give at most that many."
        )
    # The first stages take the remainder, one layer each.
    share, rest = divmod(layers, stages)
    return [stage for stage in range(stages) for _ in range(share + (stage < rest))]


def _stage(mapping: WeightMapping, stages: Sequence[int]) -> int:
    layer = layer_of(mapping)
    if layer is not None:
        return stages[layer]
    return 0 if mapping.megatron == EMBEDDING else stages[-1]


def _cuts(mapping: WeightMapping, layout: ParallelLayout) -> list[tuple[int, Bounds]]:
    """(rank, rectangle) of each part of a parameter that a tensor-parallel rank writes."""
    whole = [(0, size) for size in mapping.local_shape(1)]
    # Megatron has gate and up as two tensors, each split over the ranks.
    parts = 2 if is_gated(mapping) else 1
    size = (
        layout.tensor_model_parallel_size if mapping.expert is None else layout.expert_tensor_size
    )
    local = mapping.local_shape(size)
    split = [dim for dim, (_, n) in enumerate(whole) if n != local[dim]]
    dim = split[0] if split else 0
    # The first rank alone writes a replicated parameter.
    ranks = size if split else 1
    length = local[dim] // parts
    cuts = []
    for part in range(parts):
        for rank in range(ranks):
            start = (part * ranks + rank) * length
            bounds = [*whole]
            bounds[dim] = (start, start + length)
            cuts.append((rank, bounds))
    return cuts


def _extra_states(chunks: Iterable[Chunk]) -> list[str]:
    """Names of the extra-state objects of the chunks' layers."""
    names = []
    for chunk in chunks:
        # Megatron's layers, mostly Transformer Engine's, have an extra state. It is empty without
        # FP8 training, but a load fails if it is missing. One object per weight: its first chunk
        # stands for it.
        module, _, kind = chunk.key.rpartition(".")
        is_first = not any(start for start, _ in chunk.bounds)
        if kind != "weight" or not is_first or _has_no_extra_state(chunk.key):
            continue
        index = ".".join(map(str, chunk.slot.index or (0,)))
        counts = ".".join(map(str, chunk.slot.counts or (1,)))
        names.append(f"{module}._extra_state/shard_{index}_{counts}")
    return names


def _has_no_extra_state(key: str) -> bool:
    return key in (EMBEDDING, OUTPUT_LAYER) or key.endswith(".mlp.router.weight")
