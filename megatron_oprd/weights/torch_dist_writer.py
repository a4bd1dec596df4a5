"""Megatron's `torch_dist` checkpoints, written a chunk at a time from any source of weights.

The result is a folder that Megatron-LM's ``--load`` takes, as a released model without optimizer:

    latest_checkpointed_iteration.txt   "release"
    release/.metadata, *.distcp         torch.distributed.checkpoint's files
    release/metadata.json, common.pt    Megatron's
    release/hf/                         config.json, tokenizer and other files of the model
    manifest.json                       tool, source, checksum of every chunk
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what `.metadata` holds
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.storage import WriteResult
from typing_extensions import override

from megatron_oprd.weights.checksum import CHECKSUMS_FIELD, warn_of_nans
from megatron_oprd.weights.disk import describe_files, sync, write_json, writing
from megatron_oprd.weights.distcp_file import (
    OVERHEAD_BYTES,
    AlternatingBuffers,
    read_back,
    write_file,
)
from megatron_oprd.weights.hf_files import CONFIG_FILE, copy_companions
from megatron_oprd.weights.megatron_checkpoint import HF_FOLDER
from megatron_oprd.weights.output_folder import OutputFolder
from megatron_oprd.weights.progress import Progress
from megatron_oprd.weights.ranks import Ranks
from megatron_oprd.weights.source import WeightSource
from megatron_oprd.weights.torch_dist_files import FORMAT_FILE, RELEASE, TRACKER_FILE
from megatron_oprd.weights.torch_dist_plan import File

_COMMON_FILE = "common.pt"
# What megatron-core's dist_checkpointing.save writes.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Version 3 has query, key and value in today's order. The content's metadata is what a load asks
# the model to name its tensors by.
_COMMON = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False},
}


@dataclass(frozen=True, kw_only=True)
class TorchDistContent:
    """Everything of a checkpoint folder but the weights' values.

    Attributes:
        files: Its files and the chunks in each.
        config: The content of the model's config.json if it differs from the source's file, which
            is copied otherwise.
        origin: What the manifest says of where the checkpoint comes from: tool, source, settings,
            and everything else that the values depend on.
    """

    files: Sequence[File]
    config: Mapping[str, Any] | None
    origin: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """About what the folder takes on the disk."""
        entries = sum(len(file.chunks) + len(file.objects) for file in self.files)
        return sum(file.num_bytes for file in self.files) + entries * OVERHEAD_BYTES


def convert_to_torch_dist(
    out: Path,
    source: WeightSource,
    content: TorchDistContent,
    *,
    force: bool = False,
    ranks: Ranks | None = None,
) -> Path:
    """Writes a `torch_dist` checkpoint; can be continued, and shared by ranks, file by file.

    A chunk is read while another is written, so one or two are in memory. Every file is read back
    once it is on the disk and compared with the checksums of what was read from the source.

    Args:
        out: The folder to create.
        source: Where the weights come from. What is read of it is cast to the chunks' dtypes.
        content: What goes into the folder.
        force: Whether a checkpoint that is at ``out`` is replaced.
        ranks: The processes that share the work; each calls this alike. Rank 0 shows the progress.

    Returns:
        ``out``.

    Raises:
        UserError: ``out`` is taken or cannot be written, the source cannot be read, or a file does
            not read back as it was written; on every rank alike.
    """
    ranks = ranks or Ranks()
    fingerprint = {
        "origin": content.origin,
        "config": content.config,
        "companion_files": describe_files(source.companion_files()),
        "files": [[file.num_bytes, len(file.chunks), len(file.objects)] for file in content.files],
    }
    folder = OutputFolder(out, force=force, fingerprint=fingerprint, rank=ranks.rank)
    files = {f"__{number}_0.distcp": file for number, file in enumerate(content.files)}
    with ExitStack() as stack:
        ranks.first_then_others(lambda: stack.enter_context(folder))  # rank 0 makes the folder
        # Every rank has looked before any writes, so that all share the same work.
        records = ranks.together(lambda: {name: folder.done(name) for name in files})
        pending = {name: file for name, file in files.items() if records[name] is None}
        done_bytes = sum(file.num_bytes for name, file in files.items() if name not in pending)
        own = _share(pending, ranks)
        ranks.together(lambda: _write_files(folder, own, source, done_bytes, shown=ranks.rank == 0))
        for written in ranks.gather({name: folder.done(name) for name in own}):
            records |= written
        ranks.together(
            lambda: _finish(folder, records, source, content) if ranks.rank == 0 else None
        )
    return out


def _share(pending: Mapping[str, File], ranks: Ranks) -> dict[str, File]:
    """This rank's share of the files: the largest go first, each to the rank with the least."""
    shares: list[dict[str, File]] = [{} for _ in range(ranks.size)]
    sizes = [0] * ranks.size
    for name, file in sorted(pending.items(), key=lambda item: -item[1].num_bytes):
        rank = sizes.index(min(sizes))
        shares[rank][name] = file
        sizes[rank] += file.num_bytes
    return shares[ranks.rank]


def _write_files(
    folder: OutputFolder,
    files: Mapping[str, File],
    source: WeightSource,
    done_bytes: int,
    *,
    shown: bool,
) -> None:
    """Writes files; while one is brought to the disk and read back, the next is begun."""
    with writing(folder.out):
        (folder.path / RELEASE).mkdir(exist_ok=True)
    with (
        Progress(
            f"writing {folder.out.name}",
            done_bytes + sum(file.num_bytes for file in files.values()),
            done_bytes=done_bytes,
            shown=shown,
        ) as progress,
        ThreadPoolExecutor(1) as finisher,
    ):
        buffers = AlternatingBuffers()
        finished = finisher.submit(lambda: None)
        for name, file in files.items():
            with writing(folder.out):
                path = folder.path / RELEASE / name
                record = write_file(path, file, source, buffers, on_written=progress.advance)
            finished.result()
            finished = finisher.submit(_finish_file, folder, name, record)
        finished.result()


def _finish_file(folder: OutputFolder, name: str, record: dict[str, Any]) -> None:
    path = folder.path / RELEASE / name
    with writing(folder.out):
        sync(path)
        read_back(path, record)
    folder.finish_unit(name, record, files=[path])


def _finish(
    folder: OutputFolder,
    records: Mapping[str, dict[str, Any] | None],
    source: WeightSource,
    content: TorchDistContent,
) -> None:
    """Adds what is not weights, and commits."""
    results: list[WriteResult] = []
    checksums: dict[str, str] = {}
    nans: dict[str, int] = {}
    for name, record in records.items():
        assert record is not None, f"no rank has written {name}"
        checksums |= record["checksums"]
        nans |= record["nans"]
        for key, starts, offset, length in record["entries"]:
            place = _StorageInfo(relative_path=name, offset=offset, length=length)
            index = MetadataIndex(key, starts)
            results.append(WriteResult(index=index, size_in_bytes=length, storage_data=place))
    warn_of_nans(folder.out, nans, what="chunks")
    release = folder.path / RELEASE
    with writing(folder.out):
        _MetadataWriter(release).finish(_metadata(content.files), [results])
        torch.save(_COMMON, release / _COMMON_FILE)
        (release / FORMAT_FILE).write_text(json.dumps(_FORMAT))
        (folder.path / TRACKER_FILE).write_text(RELEASE)
        hf = release / HF_FOLDER
        hf.mkdir(exist_ok=True)
        copy_companions([source.hf_folder / CONFIG_FILE, *source.companion_files()], hf)
        if content.config is not None:
            write_json(hf / CONFIG_FILE, content.config)
    folder.commit({**content.origin, "nans": nans, CHECKSUMS_FIELD: checksums})


def _metadata(files: Sequence[File]) -> Metadata:
    stored: dict[str, Any] = {}
    for file in files:
        for chunk in file.chunks:
            tensor = stored.setdefault(
                chunk.key,
                TensorStorageMetadata(
                    properties=TensorProperties(dtype=chunk.dtype),
                    size=torch.Size(chunk.global_shape),
                    chunks=[],
                ),
            )
            tensor.chunks.append(
                ChunkStorageMetadata(
                    offsets=torch.Size(chunk.starts), sizes=torch.Size(chunk.shape)
                )
            )
        stored |= {name: BytesStorageMetadata() for name in file.objects}
    return Metadata(state_dict_metadata=stored)


class _MetadataWriter(FileSystemWriter):
    """Leaves out the name of the folder that is written, which is not the one it will have."""

    @override
    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=RELEASE)
