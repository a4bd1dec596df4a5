"""The optimizer's states in checkpoints: whole tensors of each parameter's shape.

Adam's states are main parameters and moments, and the number of updates, which the learning-rate
schedule counts too. So a checkpoint of the distributed optimizer can be loaded without it and vice
versa.

Megatron's distributed optimizer gives every data-parallel rank one slice of each bucket of its
gradient buffers, and cuts parameters wherever a slice ends. A checkpoint that any layout can load
needs states in their parameter's shape. So when saving, every rank sends its pieces to the
parameter's *owner*, one rank of the group for each parameter; when loading, the owner sends them
back. Owners have about the same number of elements: a rank holds, reads and writes 1 /
data-parallel size of the states of its model-parallel shard, and no rank ever holds all of them.

Megatron's own format of this kind, ``fully_reshardable``, is not used: megatron-core 0.16 to 0.19
concatenates a buffer's buckets without the padding between them, but slices the result with offsets
that count the padding. Every bucket after a padded one comes out shifted.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

# Elements of one state per exchange: 256 MB of fp32 to send, and as much to receive.
_ROUND_ELEMENTS = 2**26
_MOMENTS = ("exp_avg", "exp_avg_sq")

WholeStates = dict[int, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class _Divided:
    """A parameter, and the elements of it that each rank of the data-parallel group has."""

    parameter: Parameter
    ranges: Sequence[tuple[int, int]]  # [start, end) for each rank; may be empty
    owner: int  # the rank that has all of it in a checkpoint

    def size(self, rank: int) -> int:
        start, end = self.ranges[rank]
        return end - start

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of its states; an fp32 parameter is its own main parameter."""
        return _MOMENTS if self.parameter.dtype == torch.float32 else ("param", *_MOMENTS)


Sharded = dict[int, dict[str, ShardedTensor | ShardedTensorFactory]]


def sharded_states(
    optimizer: MegatronOptimizer,
    chunks: Sequence[GPTModel],
    model: dict[str, Any],
    *,
    is_loading: bool,
) -> Sharded:
    """The states that this rank writes or reads, as sharded tensors of Megatron's checkpoints.

    Every rank of the optimizer's data-parallel group has to call. ``optimizer`` is one of the
    chained optimizers. ``model`` is the sharded state of ``chunks``, the keys and offsets of which
    the states get. With ``is_loading`` the values do not matter.
    """
    if optimizer.is_stub_optimizer:  # nothing is trained on this rank
        return {}
    # Apex's and Transformer Engine's Adam have no states before the first update.
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    content, _ = extract_sharded_tensors_and_factories(model)
    # By parameter: it is the `data` of its sharded tensor.
    places = {place.data: place for place in nested_values(content)}
    if isinstance(optimizer, DistributedOptimizer):
        return _DistributedStates(optimizer).sharded(places, is_loading=is_loading)
    return {
        number: {
            key: _sharded(places[parameter], key, state, places[parameter].replica_id)
            for key, state in states.items()
        }
        for number, (parameter, states) in enumerate(_undivided_states(optimizer, chunks))
    }


@torch.no_grad()
def load_states(
    optimizer: MegatronOptimizer,
    chunks: Sequence[GPTModel],
    loaded: Mapping[int, Mapping[str, Tensor]],
    *,
    num_updates: int,
) -> None:
    """Sets the states from what was loaded into `sharded_states`, and the step counter.

    Every rank of the optimizer's data-parallel group has to call. ``loaded`` is by the parameter's
    number and the state's name.
    """
    if optimizer.is_stub_optimizer:
        return
    if isinstance(optimizer, DistributedOptimizer):
        _DistributedStates(optimizer).scatter(loaded)
    else:
        for number, (_, states) in enumerate(_undivided_states(optimizer, chunks)):
            for key, state in states.items():
                state.copy_(loaded[number][key])
    adam = optimizer.optimizer
    for group in adam.param_groups:
        # torch's Adam counts by parameter, Apex's and Transformer Engine's by group.
        if isinstance(adam, torch.optim.Adam):
            for parameter in group["params"]:
                adam.state[parameter]["step"] = torch.tensor(float(num_updates))
        elif group["params"]:
            group["step"] = num_updates


def _undivided_states(
    optimizer: MegatronOptimizer, chunks: Sequence[GPTModel]
) -> Iterator[tuple[Parameter, dict[str, Tensor]]]:
    """(model parameter, its states) of an optimizer with all states on every rank."""
    adam = optimizer.optimizer
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        # Set by Megatron on bf16 parameters that it trains; frozen ones have no states.
        main = getattr(parameter, "main_param", parameter)
        if main in adam.state:
            states = {key: adam.state[main][key] for key in _MOMENTS}
            yield parameter, states if main is parameter else {"param": main.data, **states}


def _sharded(
    place: ShardedTensor | ShardedTensorFactory, key: str, state: Tensor, replica_id: Any
) -> ShardedTensor | ShardedTensorFactory:
    """A state at its parameter's place in the checkpoint."""
    fields: dict[str, Any] = {
        "key": f"optimizer.state.{key}.{place.key}",
        "data": state.view(place.data.shape),
        "replica_id": replica_id,
    }
    # A factory has no dtype; it makes its tensors from `data`.
    if isinstance(place, ShardedTensor):
        fields["dtype"] = state.dtype
    return dataclasses.replace(place, **fields)


class _DistributedStates:
    """The states of one of Megatron's distributed optimizers, which must be allocated.

    All ranks of its data-parallel group have to call every method.
    """

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self._optimizer = optimizer
        self._group = optimizer.data_parallel_group
        self._rank, self._size = self._group.rank(), self._group.size()
        self._parameters = list(self._divided())

    def gather(self) -> WholeStates:
        """The states that this rank owns, by parameter number and name: flat fp32 on the CPU."""
        whole = self._empty()

        def write(number: int, key: str, rank: int, piece: Tensor) -> None:
            whole[number][key][slice(*self._parameters[number].ranges[rank])].copy_(piece)

        self._exchange(lambda number, key, rank: self._own(number, key), write, to_owners=True)
        return whole

    def scatter(self, whole: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Sets all states from the owners' ``whole``, as returned by `gather` but of any shape."""

        def read(number: int, key: str, rank: int) -> Tensor:
            return whole[number][key].view(-1)[slice(*self._parameters[number].ranges[rank])]

        def write(number: int, key: str, rank: int, piece: Tensor) -> None:
            self._own(number, key).copy_(piece)

        self._exchange(read, write, to_owners=False)

    def sharded(
        self,
        places: Mapping[Parameter, ShardedTensor | ShardedTensorFactory],
        *,
        is_loading: bool,
    ) -> Sharded:
        """The states that this rank owns, at their parameters' places in the checkpoint."""
        whole = self._empty() if is_loading else self.gather()
        sharded: Sharded = {}
        for number, states in whole.items():
            place = places[self._parameters[number].parameter]
            # The last number counts data-parallel replicas; only the owner writes, so it is 0. The
            # others tell copies on tensor-parallel ranks and stages apart.
            replica_id = (*place.replica_id[:2], 0)
            sharded[number] = {
                key: _sharded(place, key, state, replica_id) for key, state in states.items()
            }
        return sharded

    def _divided(self) -> Iterator[_Divided]:
        # Greedy and in the same order on every rank, so all agree on the owners without
        # communication.
        held = [0] * self._size
        for buffer in self._optimizer.buffers:
            for parameter, (start, _, bucket_number) in buffer.param_index_map.items():
                bucket = buffer.buckets[bucket_number]
                share, numel = bucket.grad_data.numel() // self._size, parameter.numel()
                first = [bucket.offset + rank * share - start for rank in range(self._size)]
                owner = held.index(min(held))
                held[owner] += numel
                one = _Divided(
                    parameter=parameter,
                    ranges=[
                        # A rank's slice of the bucket, clipped to the parameter.
                        (min(max(at, 0), numel), min(max(at + share, 0), numel))
                        for at in first
                    ],
                    owner=owner,
                )
                assert sum(map(one.size, range(self._size))) == numel, "elements without a rank"
                yield one

    def _rounds(self) -> Iterator[list[int]]:
        """Numbers of the parameters that are exchanged together; the same on every rank."""
        numbers: list[int] = []
        elements = 0
        for number, one in enumerate(self._parameters):
            if numbers and elements + one.parameter.numel() > _ROUND_ELEMENTS:
                yield numbers
                numbers, elements = [], 0
            numbers.append(number)
            elements += one.parameter.numel()
        if numbers:
            yield numbers

    def _empty(self) -> WholeStates:
        return {
            number: {key: torch.empty(one.parameter.numel(), device="cpu") for key in one.keys}
            for number, one in enumerate(self._parameters)
            if one.owner == self._rank
        }

    def _own(self, number: int, key: str) -> Tensor:
        """This rank's piece of a parameter's state, flat: a view of the optimizer's own memory."""
        one = self._parameters[number]
        states = self._optimizer._get_main_param_and_optimizer_states(one.parameter)
        own = states[key].detach().view(-1)
        assert own.numel() == one.size(self._rank), f"{key}: Megatron cuts it otherwise"
        assert own.dtype == torch.float32, f"{key} is {own.dtype}"
        return own

    def _exchange(
        self,
        read: Callable[[int, str, int], Tensor],
        write: Callable[[int, str, int, Tensor], None],
        *,
        to_owners: bool,
    ) -> None:
        """Moves every piece between the rank that uses it and its parameter's owner.

        ``read`` and ``write`` get a parameter's number, a state's name and the rank that uses the
        piece. ``to_owners`` is the direction.
        """
        device = torch.device(torch.cuda.current_device())
        used = [(owner, self._rank) for owner in range(self._size)]  # (owner, rank that uses it)
        owned = [(self._rank, user) for user in range(self._size)]
        outgoing, incoming = (used, owned) if to_owners else (owned, used)
        for numbers in self._rounds():
            # Every rank makes the same all-to-alls, even if it has no piece for some of them.
            for key in ("param", *_MOMENTS):
                going, leaving = self._pieces(numbers, key, outgoing)
                coming, arriving = self._pieces(numbers, key, incoming)
                sent = torch.cat(
                    [torch.empty(0, device=device)]
                    + [read(number, key, user).to(device) for number, user in going]
                )
                received = sent.new_empty(sum(arriving))
                dist.all_to_all_single(received, sent, arriving, leaving, group=self._group)
                at = 0
                for number, user in coming:
                    end = at + self._parameters[number].size(user)
                    write(number, key, user, received[at:end])
                    at = end

    def _pieces(
        self, numbers: Sequence[int], key: str, pairs: Sequence[tuple[int, int]]
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """The pieces of each (owner, user) of ``pairs``, in order.

        Returns (parameter's number, user) of each piece, and the number of elements of each pair.
        """
        pieces, elements = [], []
        for owner, user in pairs:
            of_pair = [
                number
                for number in numbers
                if (one := self._parameters[number]).owner == owner
                and key in one.keys
                # Megatron has no entry for a parameter on a rank that uses none of its elements.
                and one.size(user)
            ]
            pieces += [(number, user) for number in of_pair]
            elements.append(sum(self._parameters[number].size(user) for number in of_pair))
        return pieces, elements
