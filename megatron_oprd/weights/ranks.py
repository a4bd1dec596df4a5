"""The processes that share a conversion: those started by torchrun, or a single one."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from megatron_oprd.errors import UserError

_T = TypeVar("_T")
# A rank may wait in a collective while another still converts its share.
_TIMEOUT = timedelta(days=2)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that share the work; by default it works alone."""

    rank: int = 0
    size: int = 1

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: _T) -> list[_T]:
        """The values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], _T]) -> _T:
        """Runs ``action`` on all ranks and waits; a `UserError` of any is raised on every rank."""
        result: _T | None = None
        failure = None
        try:
            result = action()
        except UserError as error:
            failure = error
        for message in self.gather(None if failure is None else str(failure)):
            if message is not None:
                raise UserError(message) from failure
        return result  # type: ignore[return-value]  # None only if that is what the action gave

    def from_first(self, action: Callable[[], _T]) -> _T:
        """Runs ``action`` on rank 0; its result, or its `UserError`, reaches every rank."""
        return self.gather(self.together(lambda: action() if self.rank == 0 else None))[0]  # type: ignore[return-value]


@contextmanager
def conversion_ranks() -> Iterator[Ranks]:
    """Joins the processes started by torchrun, over gloo; a single process works alone."""
    # Set by torchrun.
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield Ranks(rank=dist.get_rank(), size=size)
    finally:
        dist.destroy_process_group()
