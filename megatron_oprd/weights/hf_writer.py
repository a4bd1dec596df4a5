"""Hugging Face checkpoint folders, written a tensor at a time.

The safetensors files are laid out beforehand, from names, shapes and dtypes; then tensors go into
their places as they come. The largest tensor is in memory, or two if they are small: one is written
while the next is made.
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
from megatron_oprd.weights.disk import describe_files, write_json, writing
from megatron_oprd.weights.hf_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, copy_companions
from megatron_oprd.weights.output_folder import OutputFolder
from megatron_oprd.weights.progress import Progress
from megatron_oprd.weights.ranks import Ranks
from megatron_oprd.weights.safetensors_file import SafetensorsWriter, TensorSpec

DEFAULT_MAX_SHARD_SIZE = 5 * 10**9
_MAX_BYTES_OF_TWO = 2**29  # of a tensor that is written and one that is read meanwhile


@dataclass(frozen=True, kw_only=True)
class HFContent:
    """Everything of a Hugging Face folder but the tensors' values.

    Attributes:
        tensors: The tensors, in the order in which they are written.
        config: The content of config.json, or the file to copy it from byte for byte.
        companion_files: Files that are copied into the folder under their own names.
        origin: What the manifest says of where the folder comes from: tool, source, settings. A
            write that may be continued needs everything in it that the values depend on.
        max_shard_size: The most bytes of tensors in one safetensors file; a tensor is never split,
            one that is larger gets a file of its own.
    """

    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any] | Path
    companion_files: Sequence[Path] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(spec.num_bytes for spec in self.tensors.values())

    def shards(self) -> dict[str, list[str]]:
        """The safetensors files and the tensors in each.

        Raises:
            ValueError: There are no tensors.
        """
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
    tensors: Iterable[tuple[str, Tensor]],
    *,
    force: bool = False,
    show_progress: bool = False,
) -> Path:
    """Writes a stream of tensors as a Hugging Face folder, whole or not at all.

    Args:
        out: The folder to create.
        content: What goes into it.
        tensors: Names and tensors, on any device, in the content's order. A tensor must not be
            changed after it was yielded.
        force: Whether a checkpoint that is at ``out`` is replaced.
        show_progress: Whether progress is shown on stderr.

    Returns:
        ``out``.

    Raises:
        UserError: ``out`` is taken (before the stream is touched) or cannot be written.
        ValueError: The stream is not what the content says.
    """
    stream = iter(tensors)

    def next_tensor(expected: str) -> Tensor:
        name, tensor = next(stream, (None, None))
        if tensor is None or name != expected:
            raise ValueError(f"the stream has {name or 'an end'} where {expected} should be")
        return tensor

    with OutputFolder(out, force=force, fingerprint=None) as folder:
        shards = content.shards()
        _write_shards(folder, content, shards, list(shards), next_tensor, shown=show_progress)
        if (left_over := next(stream, None)) is not None:
            raise ValueError(f"the stream has {left_over[0]} behind the last tensor")
        _finish(folder, content, shards)
    return out


def convert_to_hf_folder(
    out: Path,
    content: HFContent,
    read: Callable[[str], Tensor],
    *,
    force: bool = False,
    ranks: Ranks | None = None,
) -> Path:
    """Writes tensors that can be read by name as a Hugging Face folder; can be continued.

    An interrupted call is continued by the next one with the same content, file by file. Several
    ranks may share the work, file by file; each calls this with the same content.

    Args:
        out: The folder to create.
        content: What goes into it.
        read: Gives the tensor with the Hugging Face name; not called for files that are done. A
            tensor is not used any more once ``read`` is called for the second time after it.
        force: Whether a checkpoint that is at ``out`` is replaced.
        ranks: The processes that share the work. Rank 0 shows the progress.

    Returns:
        ``out``.

    Raises:
        UserError: ``out`` is taken or cannot be written; or from ``read``. On every rank, if it
            happens on any.
        ValueError: A tensor is not what the content says.
    """
    ranks = ranks or Ranks()
    shards = content.shards()
    fingerprint = {
        "origin": content.origin,
        "config": describe_files([content.config])
        if isinstance(content.config, Path)
        else content.config,
        "companion_files": describe_files(content.companion_files),
        "tensors": {name: [*spec.shape, str(spec.dtype)] for name, spec in content.tensors.items()},
        "max_shard_size": content.max_shard_size,
    }
    folder = OutputFolder(out, force=force, fingerprint=fingerprint, rank=ranks.rank)
    with ExitStack() as stack:
        ranks.first_then_others(lambda: stack.enter_context(folder))  # rank 0 makes the folder
        pending = ranks.together(lambda: [file for file in shards if folder.done(file) is None])
        own = pending[ranks.rank :: ranks.size]
        done = [name for file in shards.keys() - set(pending) for name in shards[file]]
        done_bytes = sum(content.tensors[name].num_bytes for name in done)
        ranks.together(
            lambda: _write_shards(
                folder, content, shards, own, read, done_bytes=done_bytes, shown=ranks.rank == 0
            )
        )
        ranks.together(lambda: _finish(folder, content, shards) if ranks.rank == 0 else None)
    return out


def _write_shards(
    folder: OutputFolder,
    content: HFContent,
    shards: Mapping[str, Sequence[str]],
    own: Sequence[str],
    read: Callable[[str], Tensor],
    *,
    done_bytes: int = 0,
    shown: bool,
) -> None:
    """Writes the files ``own``, each under its final name in the folder.

    While one file is brought to the disk, the next is begun.
    """
    specs = {file: {name: content.tensors[name] for name in shards[file]} for file in own}
    num_bytes = sum(spec.num_bytes for of_file in specs.values() for spec in of_file.values())
    with (
        Progress(
            f"writing {folder.out.name}",
            done_bytes + num_bytes,
            done_bytes=done_bytes,
            shown=shown,
        ) as progress,
        ThreadPoolExecutor(1) as finisher,
    ):
        finished = finisher.submit(lambda: None)
        for file in own:
            record = _write_shard(folder, file, specs[file], read, progress)
            finished.result()
            files = [folder.path / file]
            finished = finisher.submit(folder.finish_unit, file, record, files=files)
        finished.result()


def _write_shard(
    folder: OutputFolder,
    file: str,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Writes one file; while one tensor is written, the next is read and examined.

    Returns:
        The tensors' checksums, and how many NaNs are in those that have any.
    """
    record: dict[str, dict[str, Any]] = {"tensors": {}, "nans": {}}
    with writing(folder.out):
        target = SafetensorsWriter(folder.path / file, specs)

    def write(name: str, tensor: Tensor) -> None:
        with writing(folder.out):
            target.write(name, tensor)
        progress.advance(tensor.nbytes)

    # The thread ends before the file is closed, whatever happens.
    with target, ThreadPoolExecutor(1) as writer:
        written, bytes_in_flight = writer.submit(lambda: None), 0
        for name, spec in specs.items():
            if bytes_in_flight + spec.num_bytes > _MAX_BYTES_OF_TWO:
                written.result()
            tensor = read(name)
            record["tensors"][name], nans = examine(tensor)
            if nans:
                record["nans"][name] = nans
            written.result()
            written, bytes_in_flight = writer.submit(write, name, tensor), spec.num_bytes
            del tensor
        written.result()
    return record


def _finish(folder: OutputFolder, content: HFContent, shards: Mapping[str, Sequence[str]]) -> None:
    """Adds what is not weights, and commits."""
    checksums: dict[str, str] = {}
    nans: dict[str, int] = {}
    for file in shards:
        record = folder.done(file)
        assert record is not None, f"no rank has written {file}"
        checksums |= record["tensors"]
        nans |= record["nans"]
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
