"""A place in a world of one, which is all that engines of replicas need to know."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist


@pytest.fixture
def context() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    yield SimpleNamespace(
        rank=0,
        is_leader=True,
        control=world,
    )
    dist.destroy_process_group()
