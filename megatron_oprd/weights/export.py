"""This rank's shards -> a stream of full Hugging Face tensors.

The same stream feeds exported checkpoints and the rollout engine.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_oprd.parallel import ParallelContext
from megatron_oprd.weights.mapping import Mapping
from megatron_oprd.weights.parameters import named_parameters


class Exporter:
    """Gathers a model's weights on the leader of each data-parallel replica, tensor by tensor.

    Args:
        chunks: This rank's model chunks, not wrapped.
        table: The whole model's mappings. A parameter in it that no rank has is an error.
        context: This rank's place. The constructor communicates on the pipeline group.
    """

    def __init__(
        self,
        chunks: Sequence[MegatronModule],
        table: Sequence[Mapping],
        *,
        context: ParallelContext,
    ) -> None:
        self._parameters = named_parameters(chunks)
        self._table = table
        self._context = context
        names: list[list[str] | None] = [None] * context.pp_size
        dist.all_gather_object(names, list(self._parameters), group=context.groups.pp)
        self._owner = {name: stage for stage, own in enumerate(names) for name in own or ()}
        in_table = {mapping.megatron for mapping in table}
        assert in_table == self._owner.keys(), in_table ^ self._owner.keys()

    @torch.no_grad()
    def stream(
        self,
        value: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter.data,
        *,
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Yields every Hugging Face tensor, in the table's order.

        Every rank of the replica has to exhaust the stream. The leader (tensor rank 0 of stage 0)
        gets full tensors on its device, the other ranks None. Communicates on the tensor-parallel
        group of the owning stage and on the leader's pipeline group; one parameter at a time is
        held.

        Args:
            value: What to export of each parameter, in the parameter's shape: its data, or, say,
                its gradient.
            dtype: What the values are cast to; None is the parameters' own.
        """
        dtype = dtype or next(iter(self._parameters.values())).dtype
        for mapping in self._table:
            shards = self._shards(mapping, value, dtype)
            if shards is None:
                for name in mapping.hf:
                    yield name, None
                continue
            tp_size = 1 if mapping.is_replicated else self._context.tp_size
            tensors = {name: shards[0].new_empty(shape) for name, shape in mapping.hf.items()}
            for tp_rank, shard in enumerate(shards):
                for piece in mapping.pieces(tp_rank, tp_size):
                    if piece.hf is not None:
                        tensors[piece.hf][piece.hf_index] = shard[piece.local_index]
            yield from tensors.items()

    def _shards(
        self,
        mapping: Mapping,
        value: Callable[[torch.nn.Parameter], Tensor],
        dtype: torch.dtype,
    ) -> list[Tensor] | None:
        """The value of each tensor-parallel rank, on the leader; None on other ranks."""
        context = self._context
        owner = self._owner[mapping.megatron]
        if context.pp_rank not in (owner, 0):
            return None
        count = 1 if mapping.is_replicated else context.tp_size
        gathered: Tensor | None = None
        if context.pp_rank == owner:
            local = value(self._parameters[mapping.megatron]).to(dtype)
            if count == 1:
                gathered = local[None]
            else:
                if context.tp_rank == 0:
                    gathered = local.new_empty((count, *local.shape))
                parts = None if gathered is None else list(gathered)
                dist.gather(local.contiguous(), parts, group=context.groups.tp, group_dst=0)
        if context.tp_rank != 0:
            return None
        if owner != 0:
            if context.pp_rank == owner:
                assert gathered is not None
                dist.send(gathered.contiguous(), group=context.groups.pp, group_dst=0)
                return None
            gathered = torch.empty(
                (count, *mapping.local_shape(count)), dtype=dtype, device=context.device
            )
            dist.recv(gathered, group=context.groups.pp, group_src=owner)
        assert gathered is not None
        return list(gathered)
