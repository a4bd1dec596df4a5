"""The node of a process, by the launcher's variables."""

import pytest

from megatron_oprd.parallel.node import Node

VARIABLES = ("GROUP_RANK", "GROUP_WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK")


def found(monkeypatch: pytest.MonkeyPatch, **variables: int) -> Node:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return Node.of_environment()


def test_as_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    of_run = {"GROUP_RANK": 1, "GROUP_WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 4}
    first, second = (found(monkeypatch, **of_run, LOCAL_RANK=i, RANK=4 + i) for i in range(2))
    assert first == Node(number=1, count=3, num_ranks=4, is_first_rank=True)
    assert second == Node(number=1, count=3, num_ranks=4, is_first_rank=False)


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a node has once is not started by each node's first rank, which nobody can number."""
    alone = Node(number=0, count=1, num_ranks=1, is_first_rank=True)
    assert found(monkeypatch) == alone
    assert not found(monkeypatch, RANK=4, LOCAL_RANK=0).is_first_rank
