"""Writes Hugging Face checkpoint folders, one tensor at a time.

The safetensors files are laid out beforehand from names, shapes and dtypes. The largest tensor is
in memory, or two small ones: one is written while the next is produced.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_oprd.weights.checksum import CHECKSUMS_FIELD, examine, warn_of_nans
from megatron_oprd.weights.disk import sync, write_json, writing
from megatron_oprd.weights.hf_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, copy_companions
from megatron_oprd.weights.output_folder import OutputFolder
from megatron_oprd.weights.progress import Progress
from megatron_oprd.weights.ranks import Ranks
from megatron_oprd.weights.safetensors_file import SafetensorsWriter, TensorSpec

DEFAULT_MAX_SHARD_SIZE = 5 * 10**9  # bytes
_MAX_BYTES_OF_TWO = 2**29  # most bytes in flight: one tensor being written, one being read


@dataclass(frozen=True, kw_only=True)
class HFContent:
    """The content of a Hugging Face folder except the tensors' values."""

    tensors: Mapping[str, TensorSpec]  # in the order in which they are written
    config: Mapping[str, Any] | Path  # content of config.json, or a file to copy byte for byte
    companion_files: Sequence[Path] = ()
    # Provenance for the manifest: tool, source, settings.
    origin: Mapping[str, Any] = field(default_factory=dict)
    # Most bytes of tensors per safetensors file. A larger tensor gets a file of its own, unsplit.
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE

    @property
    def num_bytes(self) -> int:
        """The total size of all tensors."""
        return sum(spec.num_bytes for spec in self.tensors.values())

    def shards(self) -> dict[str, list[str]]:
        """The safetensors files and their tensors; `ValueError` if there are none."""
        shards: list[list[str]] = []
        size = 0
        for name, spec in self.tensors.items():
            if not shards or size + spec.num_bytes > self.max_shard_size:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += spec.num_bytes
        if not shards:
            raise ValueError("no tensors to write")
        if len(shards) == 1:
            return {SINGLE_FILE: shards[0]}
        return {
            f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
            for number, names in enumerate(shards, start=1)
        }


def write_hf_folder(
    out: Path,
    content: HFContent,
    tensors: Iterable[tuple[str, Tensor]],  # on any device
    *,
    force: bool = False,  # replaces a checkpoint at `out`
    show_progress: bool = False,
) -> Path:
    """Writes a stream of tensors as a Hugging Face folder, whole or not at all; returns ``out``.

    The stream has the content's order. Its producer must not change a tensor after yielding it.

    Raises:
        UserError: ``out`` is taken (checked before the stream is consumed) or cannot be written.
        ValueError: The stream does not match ``content``.
    """
    stream = iter(tensors)

    def next_tensor(expected: str) -> Tensor:
        name, tensor = next(stream, (None, None))
        if tensor is None or name != expected:
            raise ValueError(f"the stream has {name or 'an end'} where {expected} should be")
        return tensor

    with OutputFolder(out, force=force) as folder:
        shards = content.shards()
        records = _write_shards(folder.path, out, content, shards, next_tensor, shown=show_progress)
        if (left_over := next(stream, None)) is not None:
            raise ValueError(f"the stream has {left_over[0]} after the last tensor")
        _finish(folder, content, shards, records)
    return out


def convert_to_hf_folder(
    out: Path,
    content: HFContent,
    # By Hugging Face name. It may reuse a tensor's memory from its second call after it.
    read: Callable[[str], Tensor],
    *,
    force: bool = False,  # replaces a checkpoint at `out`
    ranks: Ranks | None = None,  # None: this process alone
) -> Path:
    """Writes tensors that can be read by name as a Hugging Face folder, whole or not at all.

    ``ranks`` share the work, file by file, with the same content; rank 0 shows progress. Returns
    ``out``.

    Raises:
        UserError: On every rank, if ``out`` is taken or cannot be written or ``read`` fails on any.
        ValueError: A tensor does not match ``content``.
    """
    ranks = ranks or Ranks()
    shards = content.shards()
    folder = OutputFolder(out, force=force)
    with ExitStack() as stack:
        path = ranks.from_first(lambda: stack.enter_context(folder).path)
        # Files are about equally large, so dealing them out in turn balances the ranks.
        own = {file: shards[file] for file in list(shards)[ranks.rank :: ranks.size]}
        records = ranks.together(
            lambda: _write_shards(path, out, content, own, read, shown=ranks.rank == 0)
        )
        everyones = {
            file: one for of_rank in ranks.gather(records) for file, one in of_rank.items()
        }
        ranks.from_first(lambda: _finish(folder, content, shards, everyones))
    return out


def _write_shards(
    path: Path,
    out: Path,
    content: HFContent,
    shards: Mapping[str, Sequence[str]],
    read: Callable[[str], Tensor],
    *,
    shown: bool,
) -> dict[str, dict[str, Any]]:
    """Writes files into ``path`` and returns their records; syncs one while writing the next."""
    specs = {
        file: {name: content.tensors[name] for name in names} for file, names in shards.items()
    }
    num_bytes = sum(spec.num_bytes for of_file in specs.values() for spec in of_file.values())
    records = {}
    with (
        Progress(f"writing {out.name}", num_bytes, shown=shown) as progress,
        ThreadPoolExecutor(1) as finisher,
    ):
        finished = finisher.submit(lambda: None)
        for file in shards:
            records[file] = _write_shard(path / file, specs[file], read, progress, out)
            with writing(out):
                finished.result()
            finished = finisher.submit(sync, path / file)
        with writing(out):
            finished.result()
    return records


def _write_shard(
    file: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    progress: Progress,
    out: Path,
) -> dict[str, dict[str, Any]]:
    """Writes one file; returns its tensors' checksums and the counts of NaNs above zero."""
    record: dict[str, dict[str, Any]] = {"tensors": {}, "nans": {}}
    with writing(out):
        target = SafetensorsWriter(file, specs)

    def write(name: str, tensor: Tensor) -> None:
        with writing(out):
            target.write(name, tensor)
        progress.advance(tensor.nbytes)

    # The executor is entered last, so its thread ends before the file is closed, even on an error.
    with target, ThreadPoolExecutor(1) as writer:
        written, bytes_in_flight = writer.submit(lambda: None), 0
        for name, spec in specs.items():
            # Too large for two in memory: wait before reading the next.
            if bytes_in_flight + spec.num_bytes > _MAX_BYTES_OF_TWO:
                written.result()
            tensor = read(name)
            record["tensors"][name], nans = examine(tensor)
            if nans:
                record["nans"][name] = nans
            written.result()
            written, bytes_in_flight = writer.submit(write, name, tensor), spec.num_bytes
            # Only the writer thread holds the tensor now, so a large one is freed once it is
            # written.
            del tensor
        written.result()
    return record


def _finish(
    folder: OutputFolder,
    content: HFContent,
    shards: Mapping[str, Sequence[str]],
    records: Mapping[str, dict[str, Any]],
) -> None:
    """Writes everything except the weights, and commits."""
    checksums: dict[str, str] = {}
    nans: dict[str, int] = {}
    for file in shards:
        checksums |= records[file]["tensors"]
        nans |= records[file]["nans"]
    warn_of_nans(folder.out, nans, what="tensors")
    with writing(folder.out):
        copy_companions(content.companion_files, folder.path)
        if isinstance(content.config, Path):
            shutil.copyfile(content.config, folder.path / CONFIG_FILE)
        else:
            write_json(folder.path / CONFIG_FILE, content.config)
        if list(shards) != [SINGLE_FILE]:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": content.num_bytes}, "weight_map": weight_map}
            write_json(folder.path / INDEX_FILE, index)
    folder.commit({**content.origin, "nans": nans, CHECKSUMS_FIELD: checksums})
