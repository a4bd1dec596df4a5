import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_oprd.errors import UserError
from megatron_oprd.weights.checksum import checksum
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.hf_writer import (
    HFContent,
    convert_to_hf_folder,
    write_hf_folder,
)
from megatron_oprd.weights.ranks import Ranks
from megatron_oprd.weights.safetensors_file import SafetensorsWriter, TensorSpec

CONFIG = {"model_type": "llama", "num_hidden_layers": 1}
TENSORS = {str(i): torch.full((size,), float(i)) for i, size in enumerate([2, 2, 3, 9, 1])}
SHARDS = [["0", "1"], ["2"], ["3"], ["4"]]  # of 16 bytes


def content_of(tensors: Mapping[str, Tensor], **fields: Any) -> HFContent:
    specs = {
        name: TensorSpec(shape=tuple(tensor.shape), dtype=tensor.dtype)
        for name, tensor in tensors.items()
    }
    given: dict[str, Any] = {"tensors": specs, "config": CONFIG, "max_shard_size": 16} | fields
    return HFContent(**given)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("max_shard_size", [10**9, 4000, 1])
def test_transformers_loads_what_was_written(tmp_path: Path, max_shard_size: int) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    companion = tmp_path / "generation_config.json"
    model.generation_config.save_pretrained(tmp_path)
    state = model.state_dict()
    out = tmp_path / "deep" / "out"
    content = content_of(
        state,
        config=model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]},
        companion_files=[companion],
        max_shard_size=max_shard_size,
        origin={"tool": "test"},
    )

    assert write_hf_folder(out, content, iter(state.items())) == out

    assert (out / companion.name).read_bytes() == companion.read_bytes()
    shards = sorted(out.glob("*.safetensors"))
    if max_shard_size == 10**9:
        assert [path.name for path in shards] == ["model.safetensors"]
    else:
        assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
        assert len(shards) == len(state) if max_shard_size == 1 else 1 < len(shards) < len(state)
        for shard in shards:
            sizes = [tensor.nbytes for tensor in load_file(shard).values()]
            assert len(sizes) == 1 or sum(sizes) <= max_shard_size
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
        assert sorted(index["weight_map"]) == sorted(state)
    assert {path.name for path in out.parent.iterdir()} == {"out"}
    assert {oct(path.stat().st_mode) for path in out.iterdir()} == {
        oct((out / "config.json").stat().st_mode)
    }
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tool"] == "test"
    assert manifest["checksums_xxh3_128"] == {name: checksum(t) for name, t in state.items()}

    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_shards_are_filled_up_to_the_limit(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "out", content_of(TENSORS), TENSORS.items())
    shards = [sorted(load_file(f)) for f in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert shards == SHARDS


def forbidden_stream() -> Iterator[tuple[str, Tensor]]:
    raise AssertionError("the stream was touched")
    yield


def test_existing_folder_needs_force(tmp_path: Path) -> None:
    content = content_of(TENSORS)
    out = write_hf_folder(tmp_path / "out", content, TENSORS.items())
    before = files_of(out)
    with pytest.raises(UserError, match=r"out is not empty; give another folder, or --force"):
        write_hf_folder(out, content, forbidden_stream())
    assert files_of(out) == before

    other = {"z": torch.ones(3)}
    write_hf_folder(out, content_of(other), other.items(), force=True)
    assert HFCheckpoint(out).names() == ["z"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_replaces_the_folder_it_reads_from(tmp_path: Path) -> None:
    out = write_hf_folder(tmp_path / "out", content_of(TENSORS), TENSORS.items())
    source = HFCheckpoint(out)
    stream = ((name, source.read(name) + 1) for name in TENSORS)
    write_hf_folder(out, content_of(TENSORS), stream, force=True)
    assert torch.equal(HFCheckpoint(out).read("3"), torch.full((9,), 4.0))


@pytest.mark.parametrize("force", [False, True])
def test_failing_stream_leaves_nothing(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    if force:
        write_hf_folder(out, content_of(TENSORS), TENSORS.items())
    before = files_of(out) if force else {}

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from list(TENSORS.items())[:3]
        assert any(path.name.endswith(".tmp") for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hf_folder(out, content_of(TENSORS), failing(), force=force)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if force else [])
    assert not force or files_of(out) == before


@pytest.mark.parametrize("fails_at", ["open", "write"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    place = "__init__" if fails_at == "open" else "write"
    monkeypatch.setattr(SafetensorsWriter, place, full)
    with pytest.raises(UserError, match=r"cannot write .*out: .*No space left"):
        write_hf_folder(tmp_path / "out", content_of(TENSORS), TENSORS.items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], r"has an end where 0 should be"),
        ([("0", torch.zeros(2))] * 2, r"has 0 where 1 should be"),
        ([*TENSORS.items(), ("5", torch.zeros(1))], r"has 5 after the last tensor"),
        (
            [("0", torch.zeros(3)), *list(TENSORS.items())[1:]],
            r"tensor 0 is \[3\] of torch.float32; .* was to get \[2\]",
        ),
    ],
)
def test_streams_that_are_wrong(
    tmp_path: Path, tensors: list[tuple[str, Tensor]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_hf_folder(tmp_path / "out", content_of(TENSORS), tensors)
    with pytest.raises(ValueError, match="no tensors to write"):
        write_hf_folder(tmp_path / "out", content_of({}), [])
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True, kw_only=True)
class ThreadRanks(Ranks):
    """Threads in the place of processes."""

    meeting: threading.Barrier
    values: dict[int, Any]

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.meeting.wait()
        gathered = [self.values[rank] for rank in range(self.size)]
        self.meeting.wait()
        return gathered


def on_two_ranks(action: Callable[[Ranks], object]) -> None:
    meeting, values = threading.Barrier(2, timeout=20), dict[int, Any]()
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda rank: action(ThreadRanks(rank=rank, size=2, meeting=meeting, values=values)),
                (0, 1),
            )
        )


def test_ranks_share_the_files(tmp_path: Path) -> None:
    read: dict[int, list[str]] = {0: [], 1: []}

    def convert(ranks: Ranks) -> None:
        def of(name: str) -> Tensor:
            read[ranks.rank].append(name)
            return TENSORS[name]

        convert_to_hf_folder(tmp_path / "out", content_of(TENSORS), of, ranks=ranks)

    on_two_ranks(convert)
    assert read == {0: ["0", "1", "3"], 1: ["2", "4"]}
    whole = convert_to_hf_folder(tmp_path / "whole", content_of(TENSORS), TENSORS.__getitem__)
    assert files_of(tmp_path / "out") == files_of(whole)


def test_an_error_of_one_rank_ends_all(tmp_path: Path) -> None:
    ended: dict[int, str] = {}

    def convert(ranks: Ranks) -> None:
        def of(name: str) -> Tensor:
            if name == "2":
                raise UserError("cannot read it")
            return TENSORS[name]

        try:
            convert_to_hf_folder(tmp_path / "out", content_of(TENSORS), of, ranks=ranks)
        except UserError as error:
            ended[ranks.rank] = str(error)

    on_two_ranks(convert)
    assert ended == {0: "cannot read it", 1: "cannot read it"}
    assert list(tmp_path.iterdir()) == []


def test_nans_are_reported_and_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {"fine": torch.tensor([1.0, torch.inf, -torch.inf]), "bad": torch.ones(2, 3)}
    tensors["bad"][1, :2] = torch.nan
    with caplog.at_level(logging.WARNING):
        out = write_hf_folder(tmp_path / "out", content_of(tensors), tensors.items())
    assert "out: 2 values are NaN, as they came, in 1 tensors; the first is bad" in caplog.text
    assert json.loads((out / "manifest.json").read_text())["nans"] == {"bad": 2}
    assert HFCheckpoint(out).read("bad").isnan().sum() == 2
