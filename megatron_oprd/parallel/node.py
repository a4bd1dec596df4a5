"""The node of this process, as the launcher numbers the run's nodes."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the run, seen from one of its ranks."""

    number: int  # torchrun's GROUP_RANK; 0 has global rank 0
    count: int  # nodes of the run
    num_ranks: int  # on this node
    is_first_rank: bool  # whether this process starts what a node has once

    @classmethod
    def of_environment(cls) -> "Node":
        """Reads torchrun's variables; without them the run counts as one node."""
        number = os.environ.get("GROUP_RANK")
        # Without numbers of nodes every node would be 0; then only global rank 0 starts anything.
        rank = os.environ.get("RANK" if number is None else "LOCAL_RANK", "0")
        return cls(
            number=int(number or 0),
            count=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
            num_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            is_first_rank=rank == "0",
        )
