"""This rank's shards -> a stream of full Hugging Face tensors.

The same stream feeds exported checkpoints and the rollout engine.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.weights.mapping import Mapping
from megatron_oprd.weights.megatron_keys import named_parameters


class Exporter:
    """Gathers a model's weights on the leader of each data-parallel replica, tensor by tensor.

    A replica is one of everything but the experts. Its experts come from the group of ranks that
    has one of each expert (expert-tensor-parallel x expert-parallel), which is a part of the
    replica or spans several. So all replicas have to stream together.

    Args:
        chunks: This rank's model chunks, not wrapped.
        table: The whole model's mappings. A parameter in it that no rank has is an error.
        context: This rank's place. The constructor communicates on the pipeline group and on the
            group that has one of each expert.

    Attributes:
        frozen_names: The Hugging Face tensors that a stream with ``trainable_only`` leaves out. A
            layer with a parameter that trains is not among them: a reader that keeps several
            tensors of a layer in one needs all of them or none.
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
            # Megatron marks a tied head so, which the last stage has a copy of.
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
        for part, trainable_part in _all_gather((stage_of, trainable), context.groups.tp_ep):
            self._stage_of |= part
            trainable_units |= {_unit(name) for name in trainable_part}
        in_table = {mapping.megatron for mapping in table}
        assert in_table == self._stage_of.keys(), in_table ^ self._stage_of.keys()
        frozen = [one for one in table if _unit(one.megatron) not in trainable_units]
        self.frozen_names = frozenset(name for mapping in frozen for name in mapping.hf)

    @torch.no_grad()
    def stream(
        self,
        value: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter.data,
        *,
        dtype: torch.dtype | None = None,
        trainable_only: bool = False,
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Yields every Hugging Face tensor, in the table's order.

        Every rank has to exhaust the stream. The leaders (tensor rank 0 of stage 0) get full
        tensors on their device, the other ranks None. Communicates on the owning stage's
        tensor-parallel group, or for an expert on its group that has one of each expert, and on
        the leader's pipeline group; one parameter at a time is held.

        Args:
            value: What to export of each parameter, in the parameter's shape: its data, or, say,
                its gradient.
            dtype: What the values are cast to; None is the parameters' own.
            trainable_only: Leaves out ``frozen_names``, which nothing is communicated for. The same
                on all ranks.
        """
        dtype = dtype or next(iter(self._parameters.values())).dtype
        for mapping in self._table:
            if trainable_only and mapping.hf.keys() <= self.frozen_names:
                continue
            shards = self._shards(mapping, value, dtype)
            if shards is None:
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
    ) -> list[Tensor] | None:
        """The value of each rank that the parameter is split over, on the leader; else None."""
        context = self._context
        stage = self._stage_of[mapping.megatron]
        if context.pp_rank not in (stage, 0):
            return None
        gathered: Tensor | None = None
        if context.pp_rank == stage:
            parameter = self._parameters.get(mapping.megatron)
            local = None if parameter is None else value(parameter).to(dtype).contiguous()
            if mapping.expert is not None:
                gathered = self._gather_expert(mapping, local, dtype)
            else:
                assert local is not None
                gathered = self._gather(mapping, local)
        if context.tp_rank != 0:
            return None
        if stage != 0:
            if context.pp_rank == stage:
                assert gathered is not None
                dist.send(gathered, group=context.groups.pp, group_dst=0)
                return None
            gathered = self._empty(mapping, dtype)
            dist.recv(gathered, group=context.groups.pp, group_src=stage)
        assert gathered is not None
        return list(gathered)

    def _gather(self, mapping: Mapping, local: Tensor) -> Tensor | None:
        """The shards [tp, ...] on tensor rank 0 of this stage."""
        context = self._context
        if mapping.is_replicated or context.tp_size == 1:
            return local[None]
        gathered = self._empty(mapping, local.dtype) if context.tp_rank == 0 else None
        parts = None if gathered is None else list(gathered)
        dist.gather(local, parts, group=context.groups.tp, group_dst=0)
        return gathered

    def _gather_expert(self, mapping: Mapping, local: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The shards [etp, ...] on every rank of the group that has one of each expert.

        Leaders of several replicas may be among them.
        """
        place, group = self._context.place, self._context.groups.tp_ep
        ep_rank = mapping.expert_rank(place.ep_size)
        assert ep_rank is not None
        gathered = self._empty(mapping, dtype)
        for etp_rank, shard in enumerate(gathered):
            source = ep_rank * place.etp_size + etp_rank
            if group.rank() == source:
                assert local is not None, f"{mapping.megatron} is missing on its rank"
                shard.copy_(local)
            dist.broadcast(shard, group=group, group_src=source)
        return gathered

    def _empty(self, mapping: Mapping, dtype: torch.dtype) -> Tensor:
        """Room for a parameter's shards, [ranks that it is split over, ...]."""
        _, size = (0, 1) if mapping.is_replicated else mapping.split_at(self._context.place)
        return torch.empty(
            (size, *mapping.local_shape(size)), dtype=dtype, device=self._context.device
        )


def _unit(name: str) -> str:
    """What is streamed whole or not at all: the parameter's decoder layer, or itself."""
    layer = re.match(r"decoder\.layers\.\d+\.", name)
    return layer[0] if layer else name


def _all_gather(value: object, group: dist.ProcessGroup) -> list:
    values: list = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
