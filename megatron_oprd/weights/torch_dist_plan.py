"""How a model's weights are cut into chunks and files of a `torch_dist` checkpoint.

Any layout loads any checkpoint. Chunks are what a rank of the chosen layout would have written, so
that a run of this layout loads whole chunks, and a file holds chunks of one rank only.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from megatron_oprd.config.schema import ParallelConfig
from megatron_oprd.errors import UserError
from megatron_oprd.weights.mapping import Mapping as WeightMapping
from megatron_oprd.weights.megatron_keys import (
    EMBEDDING,
    OUTPUT_LAYER,
    Slot,
    is_gated,
    layer_of,
    num_layers,
    slots,
)
from megatron_oprd.weights.positioned_reads import Bounds, shape_of

MAX_FILE_BYTES = 10**9


@dataclass(frozen=True, kw_only=True)
class TargetLayout:
    """The layout whose ranks load whole chunks.

    Attributes:
        tensor_model_parallel_size: Ranks that share each layer's matrices.
        pipeline_model_parallel_size: Ranks that share the layers.
        expert_model_parallel_size: Ranks that share out the experts of each layer.
        expert_tensor_parallel_size: Ranks that share each expert's matrices; None is
            ``tensor_model_parallel_size``.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "TargetLayout":
        """What of a run's layout decides which weights a rank has."""
        return cls(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        )

    @property
    def expert_tensor_size(self) -> int:
        """``expert_tensor_parallel_size``, its default filled in."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One chunk of a global tensor.

    Attributes:
        mapping: The parameter that it is a part of.
        bounds: Which part, as a rectangle of the whole, unsplit parameter.
        slot: Where the parameter is in the global tensor.
        dtype: The global tensor's.
    """

    mapping: WeightMapping
    bounds: Bounds
    slot: Slot
    dtype: torch.dtype

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
        """The chunk's first element in the global tensor."""
        return (*self.slot.index, *(start for start, _ in self.bounds))

    @property
    def shape(self) -> tuple[int, ...]:
        """The chunk's shape; the leading dimensions of layers and experts have size 1."""
        return (*(1 for _ in self.slot.index), *shape_of(self.bounds))

    @property
    def name(self) -> str:
        """The global tensor's name and the chunk's first element in it."""
        return chunk_name(self.key, self.starts)

    @property
    def num_bytes(self) -> int:
        """The bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of the checkpoint.

    Attributes:
        chunks: The chunks in it.
        objects: Names of empty objects in it.
    """

    chunks: list[Chunk] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """The bytes of the chunks' values."""
        return sum(chunk.num_bytes for chunk in self.chunks)


def chunk_name(key: str, starts: Sequence[int]) -> str:
    """Names a chunk in messages and manifests."""
    return f"{key}[{','.join(map(str, starts))}]"


def plan_files(
    table: Sequence[WeightMapping],
    *,
    layout: TargetLayout,
    dtypes: Mapping[str, torch.dtype],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[File]:
    """Cuts a model into chunks and deals them out to files.

    Args:
        table: The model's mappings.
        layout: The layout whose ranks load whole chunks.
        dtypes: The dtype of each parameter, by its Megatron name; of the parameters in one global
            tensor the widest counts.
        max_file_bytes: A file takes no further chunk beyond this.

    Raises:
        UserError: The layout does not divide the model.
    """
    layers = num_layers(table)
    stages = stage_of_layers(layers, layout.pipeline_model_parallel_size)
    stored: dict[str, torch.dtype] = {}
    for mapping in table:
        key, dtype = slots(mapping, layers)[0].key, dtypes[mapping.megatron]
        stored[key] = torch.promote_types(stored.get(key, dtype), dtype)

    by_rank: dict[tuple[int, int, int], list[Chunk]] = {}
    for mapping in table:
        slot = slots(mapping, layers)[0]
        stage = _stage(mapping, stages)
        try:
            ep_rank = mapping.expert_rank(layout.expert_model_parallel_size)
            cuts = _cuts(mapping, layout)
        except ValueError as error:
            raise UserError(f"the layout does not fit the model: {error}.") from None
        for tp_rank, bounds in cuts:
            # Rank in the pipeline; in the expert-parallel group, none first; in the tensor group.
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
    """The pipeline stage of each layer; the first stages have one more where they are uneven.

    Raises:
        UserError: There are more stages than layers.
    """
    if stages > layers:
        raise UserError(
            f"--pipeline-model-parallel-size {stages}: the model has {layers} layers; give at "
            "most that many."
        )
    share, rest = divmod(layers, stages)
    return [stage for stage in range(stages) for _ in range(share + (stage < rest))]


def _stage(mapping: WeightMapping, stages: Sequence[int]) -> int:
    layer = layer_of(mapping)
    if layer is not None:
        return stages[layer]
    return 0 if mapping.megatron == EMBEDDING else stages[-1]


def _cuts(mapping: WeightMapping, layout: TargetLayout) -> list[tuple[int, Bounds]]:
    """The rectangles of a parameter that ranks of its tensor-parallel group write: (rank, bounds).

    Gate and up projection are two tensors to Megatron, each split over the ranks; of what every
    rank holds, the first writes it.
    """
    whole = [(0, size) for size in mapping.local_shape(1)]
    parts = 2 if is_gated(mapping) else 1
    size = (
        layout.tensor_model_parallel_size if mapping.expert is None else layout.expert_tensor_size
    )
    local = mapping.local_shape(size)
    split = [dim for dim, (_, n) in enumerate(whole) if n != local[dim]]
    dim = split[0] if split else 0
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
    """Names of the objects that go with the chunks' layers.

    Megatron's layers, those of Transformer Engine above all, keep an extra state, which is empty
    without FP8 training, and a load fails where it is missing.
    """
    names = []
    for chunk in chunks:
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
