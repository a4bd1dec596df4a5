"""Gathers the ranks' shards into a stream of full Hugging Face tensors.

Both exported checkpoints and the rollout engines consume it.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.weights.expert_parts import stacked, stored_names, stored_shapes
from megatron_oprd.weights.mapping import Mapping
from megatron_oprd.weights.megatron_keys import named_parameters


class Exporter:
    """Gathers a model's weights on every rank, tensor by tensor.

    A replica has one copy of everything except the experts. These come from the group with one copy
    of each expert (expert-tensor-parallel x expert-parallel ranks), which may be part of a replica
    or span several. So all replicas have to stream together.

    The constructor communicates on the pipeline group and on the expert group.

    Args:
        chunks: This rank's model chunks, not wrapped.
        table: The whole model's mappings; every parameter must exist on some rank.
        context: This rank's process groups and ranks.

    Attributes:
        frozen_names: The Hugging Face tensors that ``trainable_only`` skips. It skips whole layers
            only, because a reader that fuses several tensors of a layer needs all of them or none.
    """

    def __init__(
        self,
        chunks: Sequence[MegatronModule],
        table: Sequence[Mapping],
        *,
        context: ParallelContext,
    ) -> None:
        self._parameters = {
            name: parameter
            for name, parameter in named_parameters(chunks).items()
            # The last stage's copy of a tied embedding, which Megatron marks as shared.
            if not getattr(parameter, "shared", False)
        }
        self._table = table
        self._context = context
        trains = {name: one.requires_grad for name, one in self._parameters.items()}
        stages = _all_gather(trains, context.groups.pp)
        stage_of = {name: stage for stage, names in enumerate(stages) for name in names}
        trainable = {name for names in stages for name, trains in names.items() if trains}
        self._stage_of: dict[str, int] = {}
        trainable_units: set[str] = set()
        # Experts differ between the ranks of a stage, so one rank per stage does not know all
        # names.
        for part, trainable_part in _all_gather((stage_of, trainable), context.groups.tp_ep):
            self._stage_of |= part
            trainable_units |= {_unit(name) for name in trainable_part}
        in_table = {mapping.megatron for mapping in table}
        assert in_table == self._stage_of.keys(), in_table ^ self._stage_of.keys()
        frozen = [one for one in table if _unit(one.megatron) not in trainable_units]
        self._frozen = frozenset(name for mapping in frozen for name in mapping.hf)
        self._stored_shapes = stored_shapes(table)
        self.frozen_names = frozenset(stored_names(self._frozen))

    @torch.no_grad()
    def stream(
        self,
        # The value to export, in the parameter's shape; for example its gradient.
        value: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter.data,
        *,
        dtype: torch.dtype | None = None,  # None: the parameters' own
        trainable_only: bool = False,  # skips `frozen_names`; the same on all ranks
        wanted: bool = True,  # False: this rank only communicates, and gets None for each tensor
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Yields every Hugging Face tensor, in the table's order; all ranks have to exhaust it.

        Experts that the model's folders have stacked are stacked, one layer's at a time.

        A parameter's shards go from their stage to the others on the pipeline group, and are then
        gathered in each stage on the tensor-parallel group (an expert's on the expert group). So
        every shard crosses between stages once. One parameter at a time is in memory.
        """
        dtype = dtype or next(iter(self._parameters.values())).dtype
        parts = self._parts(value, dtype, trainable_only=trainable_only, wanted=wanted)
        yield from stacked(parts, self._stored_shapes)

    def _parts(
        self,
        value: Callable[[torch.nn.Parameter], Tensor],
        dtype: torch.dtype,
        *,
        trainable_only: bool,
        wanted: bool,
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Yields the tensors under the table's names."""
        for mapping in self._table:
            # Decided alike on all ranks, so nothing is communicated for these.
            if trainable_only and mapping.hf.keys() <= self._frozen:
                continue
            shards = self._shards(mapping, value, dtype)
            if not wanted:
                for name in mapping.hf:
                    yield name, None
                continue
            tensors = {name: shards[0].new_empty(shape) for name, shape in mapping.hf.items()}
            for rank, shard in enumerate(shards):
                for piece in mapping.pieces(rank, len(shards)):
                    if piece.hf is not None:
                        tensors[piece.hf][piece.hf_index] = shard[piece.local_index]
            yield from tensors.items()

    def _shards(
        self,
        mapping: Mapping,
        value: Callable[[torch.nn.Parameter], Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        """All shards of a parameter, [ranks it is split over, ...]."""
        context = self._context
        stage = self._stage_of[mapping.megatron]
        local: Tensor | None = None
        if context.pp_rank == stage:
            parameter = self._parameters.get(mapping.megatron)
            # None: an expert of other ranks of the stage.
            local = None if parameter is None else value(parameter).to(dtype).contiguous()
        if mapping.expert is not None:
            return self._gather_expert(mapping, local, stage, dtype)
        own = self._of_stage(local, mapping, stage, dtype)
        if mapping.is_replicated or context.tp_size == 1:
            return own[None]
        gathered = self._empty(mapping, dtype)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), own, group=context.groups.tp)
        return gathered

    def _gather_expert(
        self, mapping: Mapping, local: Tensor | None, stage: int, dtype: torch.dtype
    ) -> Tensor:
        place, group = self._context.place, self._context.groups.tp_ep
        ep_rank = mapping.expert_rank(place.expert_model_parallel_size)
        assert ep_rank is not None
        gathered = self._empty(mapping, dtype)
        for etp_rank, shard in enumerate(gathered):
            # The expert-tensor-parallel rank varies fastest in the group.
            source = ep_rank * place.expert_tensor_size + etp_rank
            if group.rank() == source:
                shard.copy_(self._of_stage(local, mapping, stage, dtype))
            dist.broadcast(shard, group=group, group_src=source)
        return gathered

    def _of_stage(
        self, local: Tensor | None, mapping: Mapping, stage: int, dtype: torch.dtype
    ) -> Tensor:
        """This rank's shard, from its counterpart on the stage that has the parameter."""
        context = self._context
        if context.pp_rank != stage:
            local = self._empty(mapping, dtype)[0]
        assert local is not None, f"{mapping.megatron} is missing on its rank"
        if context.pp_size > 1:
            dist.broadcast(local, group=context.groups.pp, group_src=stage)
        return local

    def _empty(self, mapping: Mapping, dtype: torch.dtype) -> Tensor:
        """Memory for all shards of a parameter, [ranks it is split over, ...]."""
        _, size = (0, 1) if mapping.is_replicated else mapping.split_at(self._context.place)
        return torch.empty(
            (size, *mapping.local_shape(size)), dtype=dtype, device=self._context.device
        )


def _unit(name: str) -> str:
    """The decoder layer of a parameter, or the parameter itself: streamed whole or not at all."""
    layer = re.match(r"decoder\.layers\.\d+\.", name)
    return layer[0] if layer else name


def _all_gather(value: object, group: dist.ProcessGroup) -> list:
    values: list = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
