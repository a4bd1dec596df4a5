import io
import os
import pickle
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_oprd.errors import UserError
from megatron_oprd.weights.torch_dist_files import TorchDistFiles
from tests.helpers.torch_dist import change_metadata, save_torch_dist

ROWS = slice(3, 11)


def cut_up(folder: Path, name: str, tensor: Tensor, columns: int) -> None:
    """Stores ``tensor`` in chunks of ``columns`` columns instead."""
    parts = list(tensor.split(columns, dim=1))
    save_torch_dist(folder, {f"{name}.{number}": part for number, part in enumerate(parts)})

    def join(metadata: Any) -> None:
        first = metadata.state_dict_metadata[f"{name}.0"]
        chunks = []
        for number in range(len(parts)):
            old = metadata.state_dict_metadata.pop(f"{name}.{number}").chunks[0]
            place = metadata.storage_data.pop(MetadataIndex(f"{name}.{number}", old.offsets))
            old.offsets = torch.Size((0, number * columns))
            metadata.storage_data[MetadataIndex(name, old.offsets)] = place
            chunks.append(old)
        first.size, first.chunks = tensor.shape, chunks
        metadata.state_dict_metadata[name] = first

    change_metadata(folder, join)


def reads_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all positioned reads from here on."""
    sizes: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: list, offset: int) -> int:
        sizes.append(sum(len(buffer) for buffer in buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    return sizes


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64]
)
def test_slices_equal_torch_indexing(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 100, (5, 6, 7)).to(dtype)
    files = TorchDistFiles(
        save_torch_dist(tmp_path / "c", {"t": tensor, "s": torch.tensor(3).to(dtype)})
    )
    assert set(files.names()) == {"t", "s"}
    assert (files.shape("t"), files.dtype("t")) == ((5, 6, 7), dtype)
    every = slice(None)
    for slices in [
        (),
        (slice(1, 3),),
        (slice(-2, None),),
        (every, slice(2, 4)),
        (slice(1, 4), slice(5, 6), slice(1, -1)),
        (slice(3, 99), slice(0, 0)),
    ]:
        found = files.read_slice("t", *slices)
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert torch.equal(found.view(torch.uint8), tensor[slices].contiguous().view(torch.uint8))
    assert files.read_slice("s").item() == 3


def test_a_slice_of_several_chunks(tmp_path: Path) -> None:
    tensor = torch.randn(20, 12)
    cut_up(tmp_path / "c", "t", tensor, 5)  # 5, 5 and 2 columns
    files = TorchDistFiles(tmp_path / "c")
    for slices in [(), (ROWS,), (ROWS, slice(2, 12)), (ROWS, slice(4, 5)), (ROWS, slice(5, 10))]:
        assert torch.equal(files.read_slice("t", *slices), tensor[slices])


def test_a_plain_chunk_is_read_by_the_bytes_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(4096, 64)  # 1 MiB
    files = TorchDistFiles(save_torch_dist(tmp_path / "c", {"t": tensor}))
    files.read_slice("t", ROWS)
    sizes = reads_of(monkeypatch)
    assert torch.equal(files.read_slice("t", ROWS), tensor[ROWS])
    assert sizes == [tensor[ROWS].nbytes]


def not_plain() -> dict[str, Tensor]:
    return {
        "transposed": torch.randn(6, 9).t(),
        "strided": torch.randn(6, 9)[:, ::2],
        "rows": torch.randn(9, 9)[3:],  # plain, but not at the start of what is stored
        "float8": torch.randn(6, 9).to(torch.float8_e5m2),
        "parameter": torch.nn.Parameter(torch.randn(6, 9)),
    }


@pytest.mark.parametrize("name", not_plain())
def test_chunks_that_are_not_plain(tmp_path: Path, name: str) -> None:
    """torch.save keeps strides, and pickles some tensors in other ways."""
    tensor = not_plain()[name]
    folder = save_torch_dist(tmp_path / "c", {name: tensor.detach()})
    (file,) = folder.glob("*.distcp")
    torch.save(tensor, file)  # the writer may have made it contiguous

    def relocate(metadata: Any) -> None:
        (place,) = metadata.storage_data.values()
        place.offset, place.length = 0, file.stat().st_size

    change_metadata(folder, relocate)
    found = TorchDistFiles(folder).read_slice(name, slice(1, 4), slice(2, 5))
    expected = tensor.detach()[1:4, 2:5]
    assert torch.equal(found.float(), expected.float())
    assert found.dtype == tensor.dtype
    assert found.is_contiguous()


def test_reads_from_several_threads(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.randn(50, 40) for number in range(8)}
    files = TorchDistFiles(save_torch_dist(tmp_path / "c", tensors))
    wrong: list[str] = []

    def read() -> None:
        for name, tensor in tensors.items():
            for start in range(0, 50, 7):
                rows = slice(start, start + 7)
                if not torch.equal(files.read_slice(name, rows), tensor[rows]):
                    wrong.append(name)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_chunk_without_checksum_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        folder = save_torch_dist(tmp_path / "c", {"t": torch.arange(12.0)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(TorchDistFiles(folder).read_slice("t"), torch.arange(12.0))


def legacy(folder: Path) -> None:
    (folder / "mp_rank_00").mkdir(parents=True)


def zarr(folder: Path) -> None:
    folder.mkdir()
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')


def torch_dcp(folder: Path) -> None:
    save_torch_dist(folder, {"t": torch.ones(2)})
    (folder / "metadata.json").unlink()


def not_finished(folder: Path) -> None:
    save_torch_dist(folder, {"t": torch.ones(2)})
    (folder / ".metadata").unlink()


def not_json(folder: Path) -> None:
    save_torch_dist(folder, {"t": torch.ones(2)})
    (folder / "metadata.json").write_text("{")


def a_file(folder: Path) -> None:
    folder.write_text("")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (legacy, r"legacy format torch \(mp_rank_\*"),
        (zarr, "its format is zarr"),
        (torch_dcp, "torch_dcp and fsdp_dtensor"),
        (not_finished, r"\.metadata is missing"),
        (not_json, r"metadata\.json cannot be read"),
        (a_file, "it is a file"),
        (lambda folder: folder.mkdir(), r"no metadata\.json and no \.metadata"),
        (lambda folder: None, "does not exist"),
    ],
)
def test_other_formats_are_named(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "c")
    with pytest.raises(UserError, match=message):
        TorchDistFiles(tmp_path / "c")


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.system, torch.load, Path.touch])
def test_a_metadata_file_runs_nothing(tmp_path: Path, function: Any) -> None:
    folder, trace = tmp_path / "checkpoint", tmp_path / "trace"
    save_torch_dist(folder, {"a": torch.ones(2, 2)})
    argument: Any = f"touch {trace}" if function is os.system else trace
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(function, argument)))
    with pytest.raises(UserError, match=r"\.metadata cannot be read .*asks for"):
        TorchDistFiles(folder)
    assert not trace.exists()


def as_python_3_11_2(value: Metadata) -> bytes:
    """Pickled as Python 3.11.0 to 3.11.3 do: members of enumerations by way of getattr."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, one: Any) -> Any:
            if isinstance(one, Enum):
                return getattr, (type(one), one.name)
            return NotImplemented

    stream = io.BytesIO()
    Pickler(stream).dump(value)
    return stream.getvalue()


def test_a_metadata_file_of_python_3_11_2(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_torch_dist(folder, {"a": torch.ones(2, 2)})
    whole = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(as_python_3_11_2(whole))
    assert b"getattr" in (folder / ".metadata").read_bytes()
    assert TorchDistFiles(folder).names() == ["a"]


@pytest.mark.parametrize("owner", [Metadata, MetadataIndex, "text"])
def test_a_metadata_file_gets_no_other_attribute(tmp_path: Path, owner: Any) -> None:
    folder = tmp_path / "checkpoint"
    save_torch_dist(folder, {"a": torch.ones(2, 2)})
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(getattr, owner, "__init__")))
    with pytest.raises(UserError, match=r"\.metadata cannot be read .*asks for"):
        TorchDistFiles(folder)


def test_a_metadata_file_reaches_nothing_that_its_modules_import(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_torch_dist(folder, {"a": torch.ones(2, 2)})
    # os.getcwd by way of a module of the format that imports os.
    name = b"torch.distributed.checkpoint.filesystem", b"os.getcwd"
    parts = b"".join(b"\x8c" + bytes([len(one)]) + one for one in name)
    (folder / ".metadata").write_bytes(b"\x80\x04" + parts + b"\x93)R.")
    with pytest.raises(UserError, match=r"asks for torch.*os\.getcwd"):
        TorchDistFiles(folder)


def test_a_damaged_metadata_file(tmp_path: Path) -> None:
    folder = save_torch_dist(tmp_path / "c", {"t": torch.ones(2)})
    content = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"\.metadata cannot be read .*copy the checkpoint again"):
        TorchDistFiles(folder)


def test_a_missing_and_a_truncated_file(tmp_path: Path) -> None:
    folder = save_torch_dist(tmp_path / "c", {"a": torch.ones(200), "b": torch.ones(200)})
    first, second = sorted(folder.glob("*.distcp"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(
        UserError,
        match=rf"{second.name} is not whole: it has {len(whole) - 1} bytes, .* {len(whole)}",
    ):
        TorchDistFiles(folder)
    second.write_bytes(whole)
    first.unlink()
    with pytest.raises(UserError, match=rf"{first.name} is missing \(1 of 2 files are\)"):
        TorchDistFiles(folder)


def test_a_file_that_is_cut_while_it_is_open(tmp_path: Path) -> None:
    folder = save_torch_dist(tmp_path / "c", {"t": torch.ones(100_000)})
    files = TorchDistFiles(folder)
    files.read_slice("t", slice(0, 1))
    (file,) = folder.glob("*.distcp")
    os.truncate(file, 100_000)
    with pytest.raises(UserError, match="became shorter while open"):
        files.read_slice("t")
    file.unlink()
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        files.read_slice("t")


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    folder = save_torch_dist(tmp_path / "c", {"t": torch.ones(100)})
    (file,) = folder.glob("*.distcp")
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(UserError, match=r"the chunk of t at byte 0 is damaged"):
        TorchDistFiles(folder).read_slice("t")


def test_another_tensor_in_the_chunk_is_named(tmp_path: Path) -> None:
    folder = save_torch_dist(
        tmp_path / "c", {"a": torch.ones(4, 4), "b": torch.ones(4, 4).double()}
    )

    def swap(metadata: Any) -> None:
        one, other = metadata.storage_data.values()
        for field in ("relative_path", "offset", "length"):
            a, b = getattr(one, field), getattr(other, field)
            setattr(one, field, b)
            setattr(other, field, a)

    change_metadata(folder, swap)
    with pytest.raises(UserError, match=r"chunk of a at \[0, 0\] has .* torch.float64; .* says"):
        TorchDistFiles(folder).read_slice("a")


def test_missing_chunks_are_named(tmp_path: Path) -> None:
    cut_up(tmp_path / "place", "t", torch.randn(20, 12), 4)
    cut_up(tmp_path / "chunk", "t", torch.randn(20, 12), 4)
    cut_up(tmp_path / "gap", "t", torch.randn(20, 12), 4)
    index = MetadataIndex("t", (0, 4))
    change_metadata(tmp_path / "place", lambda metadata: metadata.storage_data.pop(index))
    with pytest.raises(UserError, match=r"does not say where the chunk of t at \[0, 4\] is"):
        TorchDistFiles(tmp_path / "place").shape("t")
    change_metadata(
        tmp_path / "chunk", lambda metadata: metadata.state_dict_metadata["t"].chunks.pop()
    )
    with pytest.raises(UserError, match=r"chunks of t do not make up its shape \[20, 12\]"):
        TorchDistFiles(tmp_path / "chunk").shape("t")  # before anything is read

    def overlap(metadata: Any) -> None:
        chunk = metadata.state_dict_metadata["t"].chunks[1]
        place = metadata.storage_data.pop(index)
        chunk.offsets = torch.Size((0, 2))
        metadata.storage_data[MetadataIndex("t", chunk.offsets)] = place

    change_metadata(tmp_path / "gap", overlap)
    files = TorchDistFiles(tmp_path / "gap")
    with pytest.raises(UserError, match="do not make up its shape"):
        files.read_slice("t", slice(0, 20), slice(4, 8))


def test_stream_transforms_are_refused(tmp_path: Path) -> None:
    folder = save_torch_dist(tmp_path / "c", {"t": torch.ones(4)})

    def transform(metadata: Any) -> None:
        (place,) = metadata.storage_data.values()
        place.transform_descriptors = ["stream.zstd/1"]

    change_metadata(folder, transform)
    with pytest.raises(UserError, match=r"written with stream\.zstd/1"):
        TorchDistFiles(folder)
