"""What is offloaded is on the device while it is used, and only then; numbers do not change."""

from pathlib import Path

import pytest
import torch

from megatron_oprd.models import offload
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import run_ranks

BF16 = "model.params_dtype=bf16"
MBS1 = "batch.micro_batch_size=1"
CASES = {
    "none": [BF16, MBS1],
    "teacher": [BF16, MBS1, "teacher.offload=cpu"],
    "states": [BF16, MBS1, "optimizer.offload_states=true"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of every case."""
    root = tmp_path_factory.mktemp("offload")
    pair = str(save_pair(root / "pair", "qwen2"))
    cases = [{"name": name, "pair": pair, "overrides": o} for name, o in CASES.items()]
    run_ranks("offload", cases, 1, root)
    return root


def test_numbers_do_not_change(results: Path) -> None:
    expected = torch.load(results / "none.pt")
    for name in ("teacher", "states"):
        found = torch.load(results / f"{name}.pt")
        assert found["losses"] == expected["losses"]
        for tensor, weight in expected["weights"].items():
            assert torch.equal(found["weights"][tensor], weight), tensor


# Looked at before the first step, in front of each pass of two steps (teacher, student, teacher,
# student), and after the second step.
def test_teacher_is_on_the_device_in_its_own_pass_only(results: Path) -> None:
    whole = torch.load(results / "none.pt")["seen"]["teacher"]
    assert whole == [whole[0]] * 6
    assert whole[0] > 10_000
    found = torch.load(results / "teacher.pt")["seen"]["teacher"]
    assert found == [0, whole[0], 0, whole[0], 0, 0]


def test_gradients_are_on_the_device_from_the_students_pass_to_the_update(results: Path) -> None:
    whole = torch.load(results / "none.pt")["seen"]["gradients"]
    assert whole == [whole[0]] * 6
    assert whole[0] > 10_000
    found = torch.load(results / "states.pt")["seen"]["gradients"]
    assert found == [0, 0, whole[0], 0, whole[0], 0]


def test_host_memory_is_in_blocks_of_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch rounds pinned memory up to a power of two, each block by itself."""
    monkeypatch.setattr(offload, "BLOCK_BYTES", 64)
    sizes: list[int] = []

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    tensors = [
        torch.arange(25, dtype=torch.float32),
        torch.arange(7).bfloat16(),
        torch.zeros(3, 30, dtype=torch.uint8) + 5,
    ]
    expected = [tensor.clone() for tensor in tensors]
    host = offload.Pinned(sum(tensor.nbytes for tensor in tensors))
    weights = [offload.Weight(tensor, host) for tensor in tensors]
    total = sum(tensor.nbytes for tensor in expected)
    assert sizes == [64] * (total // 64) + [total % 64]
    for weight in weights:
        weight.free()
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
    for weight in weights:
        weight.allocate()
    for weight in weights:
        weight.copy_to_device()
    for tensor, before in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, before)
