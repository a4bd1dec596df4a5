import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_oprd.errors import UserError
from megatron_oprd.weights.safetensors_file import SafetensorsFile


def saved(path: Path, tensors: dict[str, Tensor]) -> SafetensorsFile:
    save_file(tensors, path)
    return SafetensorsFile(path)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool],
)
def test_slices_equal_torch_indexing(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2 if dtype == torch.bool else 100, (5, 6, 7)).to(dtype)
    scalar = torch.tensor(1).to(dtype)
    empty = torch.zeros(0, 3).to(dtype)
    tensors = {"t": tensor, "scalar": scalar, "empty": empty}
    file = saved(tmp_path / "t.safetensors", tensors)

    every = slice(None)
    for slices in [
        (),
        (slice(1, 3),),
        (slice(-2, None),),
        (slice(3, 99), slice(0, 0)),
        (every, slice(2, 4)),
        (slice(1, 4), slice(5, 6), slice(1, -1)),
        (every, every, slice(0, 1)),
        (slice(4, 2), every, slice(3, 5)),
    ]:
        read = file.read_slice("t", slices)
        assert read.dtype == dtype
        assert read.is_contiguous()
        assert read.shape == tensor[slices].shape
        assert torch.equal(read.view(torch.uint8), tensor[slices].contiguous().view(torch.uint8)), (
            slices
        )
    assert file.read_slice("scalar", []).shape == ()
    assert file.read_slice("scalar", []).item() == scalar.item()
    assert file.read_slice("empty", []).shape == (0, 3)


def test_refuses_slices_it_cannot_read(tmp_path: Path) -> None:
    file = saved(tmp_path / "t.safetensors", {"x": torch.ones(2, 3), "y": torch.zeros(4)})
    with pytest.raises(ValueError, match="step 1"):
        file.read_slice("x", [slice(0, 2, 2)])
    with pytest.raises(ValueError, match="2 slices"):
        file.read_slice("y", [slice(0, 1), slice(0, 1)])


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes in /proc/self/io")
def test_reads_only_the_slices_bytes(tmp_path: Path) -> None:
    size = 1024
    tensors = {"t": torch.ones(size, size), "u": torch.ones(size, size)}  # 4 MiB each
    save_file(tensors, tmp_path / "t.safetensors")

    before = bytes_read()
    file = SafetensorsFile(tmp_path / "t.safetensors")
    after_opening = bytes_read()
    file.read_slice("t", [slice(10, 20)])
    after_rows = bytes_read()
    file.read_slice("t", [slice(None), slice(0, 8)])
    after_columns = bytes_read()

    slack = 10_000  # the header, and /proc/self/io itself
    assert after_opening - before < slack
    assert 10 * size * 4 <= after_rows - after_opening < 10 * size * 4 + slack
    assert size * 8 * 4 <= after_columns - after_rows < size * 8 * 4 + slack


def test_threads_read_the_same_file(tmp_path: Path) -> None:
    tensors = {str(i): torch.full((1000,), float(i)) for i in range(40)}
    file = saved(tmp_path / "t.safetensors", tensors)
    wrong: list[str] = []

    def read(names: list[str]) -> None:
        wrong.extend(n for n in names if not torch.equal(file.read_slice(n, []), tensors[n]))

    threads = [threading.Thread(target=read, args=(list(tensors)[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_file_shortened_while_open(tmp_path: Path) -> None:
    file = saved(tmp_path / "t.safetensors", {"y": torch.zeros(4)})
    file.read_slice("y", [])
    os.truncate(file.path, 40)
    with pytest.raises(UserError, match=r"t.safetensors became shorter"):
        file.read_slice("y", [])
