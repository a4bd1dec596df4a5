"""Projectors that train with the student, gathered from the ranks of a run."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.weights.megatron_keys import PROJECTORS


def gathered(
    modules: Sequence[torch.nn.Module],
    value: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter.data,
    *,
    same_everywhere: bool = True,
) -> dict[str, Tensor]:
    """A value of each projector's parameter by its name, on all ranks.

    Args:
        modules: This rank's chunks of the student.
        value: The value; by default the parameter's own.
        same_everywhere: Whether to check that all ranks with a projector have the same value, which
            is not so for gradients that the ranks of a distributed optimizer share.
    """
    own = {
        name: value(parameter).detach().cpu().clone()
        for module in modules
        for name, parameter in module.named_parameters()
        if name.startswith(f"{PROJECTORS}.")
    }
    everyone: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    merged: dict[str, Tensor] = {}
    for one in everyone:
        for name, tensor in one.items():
            found = merged.setdefault(name, tensor)
            assert not same_everywhere or torch.equal(found, tensor), name
    return merged
