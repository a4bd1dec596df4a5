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
        dp_rank=0,
        dp_size=1,
        rank=0,
        leader=0,
        is_leader=True,
        replica_control=world,
        leaders_control=world,
    )
    dist.destroy_process_group()
