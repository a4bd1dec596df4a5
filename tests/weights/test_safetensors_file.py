import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_oprd.errors import UserError
from megatron_oprd.weights import positioned_reads
from megatron_oprd.weights.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec


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
    rows, columns = 64, 16 * 1024
    tensors = {"t": torch.ones(rows, columns), "u": torch.ones(rows, columns)}  # 4 MiB each
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
    assert 10 * columns * 4 <= after_rows - after_opening < 10 * columns * 4 + slack
    # The gaps of almost 64 KiB are skipped.
    assert rows * 8 * 4 <= after_columns - after_rows < rows * 8 * 4 + slack


def test_narrow_gaps_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positioned_reads, "BLOCK", 700)  # not a multiple of a row
    tensor = torch.arange(3 * 50 * 40).view(3, 50, 40)
    file = saved(tmp_path / "t.safetensors", {"t": tensor, "matrix": tensor.view(150, 40).clone()})
    calls = 0
    preadv = os.preadv

    def counted(*args: Any) -> int:
        nonlocal calls
        calls += 1
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", counted)
    columns = (slice(1, 149), slice(30, 39))
    out = torch.empty(148, 9, dtype=torch.int64)
    assert file.read_slice("matrix", columns, out=out) is out
    assert torch.equal(out, tensor.view(150, 40)[columns])
    assert calls == 74  # two rows of 320 bytes in each, instead of 148 runs
    both = (slice(0, 2), slice(10, 45), slice(3, 30))
    assert torch.equal(file.read_slice("t", both), tensor[both])


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


def test_disk_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path / "t.safetensors", {"y": torch.zeros(4)})

    def broken(*args: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(UserError, match=r"cannot read .*t.safetensors: Input/output error"):
        file.read_slice("y", [])


def test_header_that_names_a_tensor_twice(tmp_path: Path) -> None:
    entry = json.dumps({"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})
    header = f'{{"x":{entry},"x":{entry}}}'.encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(UserError, match=r"its header has tensor 'x' twice"):
        SafetensorsFile(path)


def specs(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(shape=tuple(tensor.shape), dtype=tensor.dtype)
        for name, tensor in tensors.items()
    }


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    floats = torch.randn(5, 3)
    tensors = {
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "bool": torch.tensor([True]),
        "float8": floats.to(torch.float8_e4m3fn),
        "bfloat16": floats.bfloat16(),
        "transposed": floats.T,
        "view": floats[1:, 1:],
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "Ünicode": torch.ones(2, dtype=torch.float64),
    }
    path = tmp_path / "t.safetensors"
    with SafetensorsWriter(path, specs(tensors)) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])

    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    own = SafetensorsFile(path)
    for name, info in own.tensors.items():
        assert info.offset % info.dtype.itemsize == 0, f"{name} is not aligned"
        assert torch.equal(own.read_slice(name, []), tensors[name])


def test_writing_other_than_announced(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    announced = specs({"x": torch.ones(2), "y": torch.ones(2)})
    writer = SafetensorsWriter(path, announced)
    writer.write("x", torch.ones(2))
    for name, tensor, message in [
        ("x", torch.ones(2), r"has no place for tensor x, or has it already"),
        ("z", torch.ones(2), r"has no place for tensor z"),
        ("y", torch.ones(3), r"tensor y is \[3\] of torch.float32; .* \[2\] of torch.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer.write(name, tensor)
    with (
        pytest.raises(ValueError, match=r"t.safetensors did not get tensor x"),
        SafetensorsWriter(path, announced) as writer,
    ):
        writer.write("y", torch.ones(2))
    with pytest.raises(ValueError, match=r"tensor c: safetensors has no torch.complex64"):
        SafetensorsWriter(path, specs({"c": torch.ones(2, dtype=torch.complex64)}))
