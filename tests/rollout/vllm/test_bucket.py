"""Tensors through a shared buffer, in one process: both ends map the same memory."""

import inspect
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from megatron_oprd.rollout.vllm.bucket import Piece, ReceivingBucket, SendingBucket
from tests.helpers.bucket_process import check_other_process

CPU = torch.device("cpu")


def tensors() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in {"a": (3, 5), "b": (), "c": (7,), "large": (6, 11), "d": (1, 2, 1)}.items():
        yield name, torch.randn(shape, generator=generator)
    yield "transposed", torch.arange(20.0).view(4, 5).t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [2, 6, 32, 10**4])
def test_every_tensor_arrives(elements: int, dtype: torch.dtype) -> None:
    sender = SendingBucket(num_bytes=elements * dtype.itemsize, dtype=dtype, device=CPU)
    receiver = ReceivingBucket(sender.handle)
    fillings: list[list[Piece]] = []
    arrived: list[tuple[str, Tensor]] = []
    for pieces in sender.fill(tensors()):
        fillings.append(pieces)
        arrived += receiver.take(pieces)
    total = sum(tensor.numel() for _, tensor in tensors())
    assert len(fillings) == -(-total // (elements // 2))
    for (name, tensor), (expected_name, expected) in zip(arrived, tensors(), strict=True):
        assert name == expected_name
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected.to(dtype))
    sender.close()


def test_a_filling_stays_until_the_next_but_one() -> None:
    """The sender is one filling ahead; what was taken stays for good."""
    sender = SendingBucket(num_bytes=32, dtype=torch.float32, device=CPU)
    receiver = ReceivingBucket(sender.handle)
    stream = [(str(i), torch.full((4,), float(i))) for i in range(5)]
    fillings = sender.fill(stream)
    ahead = next(fillings)
    arrived: dict[str, Tensor] = {}
    while ahead:
        following = next(fillings, [])
        arrived |= receiver.take(ahead)
        ahead = following
    for name, tensor in stream:
        assert torch.equal(arrived[name], tensor)
    sender.close()


def test_a_lost_filling_is_noticed() -> None:
    sender = SendingBucket(num_bytes=32, dtype=torch.float32, device=CPU)
    receiver = ReceivingBucket(sender.handle)
    fillings = sender.fill([("one", torch.ones(8))])
    next(fillings)
    with pytest.raises(AssertionError, match="element 4 came after 0"):
        list(receiver.take(next(fillings)))
    sender.close()


@pytest.mark.ranks
def test_another_process() -> None:
    check_other_process(CPU, CPU)


def test_where_torch_has_the_device_of_shared_memory() -> None:
    """Engines may count the trainer's GPU otherwise than the trainer."""
    arguments = list(inspect.signature(rebuild_cuda_tensor).parameters)
    assert arguments.index("storage_device") == 6
