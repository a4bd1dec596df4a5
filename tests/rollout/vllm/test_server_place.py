"""Where a run's own vLLM servers are, where they listen, and which GPUs they may have."""

import pytest

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.errors import UserError
from megatron_oprd.parallel.node import Node
from megatron_oprd.rollout.vllm import server_place
from megatron_oprd.rollout.vllm.server_place import (
    Seen,
    address_towards,
    check_gpus,
    check_servers,
    host_of,
    servers_of,
)

TABLE = "0, GPU-aa\n1, GPU-bb\n2, GPU-cc\n3, GPU-dd\n"
FIRST = Seen(network="one", first="127.0.1.1")
SECOND = Seen(network="two", first="10.0.0.1")


def test_loopback_on_one_machine() -> None:
    assert host_of([FIRST] * 3, 2) == "127.0.0.1"


def test_what_the_other_machines_call_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the machine takes for its own name, which may be a loopback address."""
    monkeypatch.setattr(server_place, "address_towards", lambda first: f"own way to {first}")
    ranks = [FIRST, FIRST, SECOND, SECOND]
    assert [host_of(ranks, rank) for rank in (0, 1)] == ["10.0.0.1"] * 2
    assert [host_of(ranks, rank) for rank in (2, 3)] == ["own way to 10.0.0.1"] * 2


def test_the_own_address_on_the_way_to_another() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"


def test_servers_are_divided_over_nodes() -> None:
    """In the order of the nodes, which is that of ranks; each node has the same GPUs."""
    vllm = VLLMConfig(
        start_servers=4,
        server_nodes=[3, 1],
        server_gpus=[4, 5, 7, 6],
        tensor_model_parallel_size=2,
    )
    assert servers_of(vllm, 1) == {0: [4, 5], 1: [7, 6]}
    assert servers_of(vllm, 3) == {2: [4, 5], 3: [7, 6]}
    assert servers_of(vllm, 0) == {}
    assert servers_of(VLLMConfig(start_servers=2), 0) == {0: [], 1: []}


def node(number: int) -> Node:
    """One of two."""
    return Node(number=number, count=2, num_ranks=1, is_first_rank=True)


def test_a_node_that_is_not_there() -> None:
    check_servers(VLLMConfig(start_servers=2, server_nodes=[0, 1]), node(0))
    with pytest.raises(
        UserError, match=r"server_nodes = \[2, 0\]: there is no node 2; torchrun counts 2 from 0"
    ):
        check_servers(VLLMConfig(start_servers=2, server_nodes=[2, 0]), node(1))


def test_gpus_are_those_of_the_nodes_own_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    vllm = VLLMConfig(start_servers=1, server_nodes=[1], server_gpus=[0])
    check_servers(vllm, node(0))
    with pytest.raises(UserError, match=r"server_gpus = \[0\]: there is no GPU on node 1"):
        check_servers(vllm, node(1))


def test_gpus_that_are_free() -> None:
    """Ranks have the second and the last: their devices are not numbered as nvidia-smi's."""
    check_gpus([2, 0], TABLE, ["bb", "dd"], node=0)


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ([], r"start_servers on node 1 needs .*server_gpus: free for servers there are \[0, 2\]"),
        ([4], r"server_gpus = \[4\]: node 1 has no GPU 4 .*; free for .* \[0, 2\]"),
        ([2, 3], r"server_gpus = \[2, 3\]: a rank trains on GPU 3 of node 1; free for .* \[0, 2\]"),
    ],
)
def test_gpus_that_are_not(gpus: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_gpus(gpus, TABLE, ["bb", "dd"], node=1)


def test_no_gpu_is_left() -> None:
    with pytest.raises(UserError, match="a rank trains on GPU 0 of node 0; no GPU is left"):
        check_gpus([0], "0, GPU-aa\n", ["aa"], node=0)
