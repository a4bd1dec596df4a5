"""Writes Megatron's `torch_dist` checkpoints, one chunk at a time, from any source of weights.

Megatron-LM's ``--load`` takes the result as a released model without optimizer:

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
from megatron_oprd.weights.disk import sync, write_json, writing
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
# As written by megatron-core's dist_checkpointing.save.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# From version 3 on, query, key and value are in today's order. A load passes content_metadata to
# the model, which names its tensors accordingly.
_COMMON = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False},
}


@dataclass(frozen=True, kw_only=True)
class TorchDistContent:
    """The content of a checkpoint folder except the weights' values."""

    files: Sequence[File]
    # Content of the model's config.json; None copies the source's file.
    config: Mapping[str, Any] | None
    # Provenance for the manifest: tool, source, settings and all else that the values depend on.
    origin: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """The approximate size of the folder on disk."""
        entries = sum(len(file.chunks) + len(file.objects) for file in self.files)
        return sum(file.num_bytes for file in self.files) + entries * OVERHEAD_BYTES


def convert_to_torch_dist(
    out: Path,
    source: WeightSource,  # cast to the chunks' dtypes
    content: TorchDistContent,
    *,
    force: bool = False,  # replaces a checkpoint at `out`
    ranks: Ranks | None = None,  # None: this process alone
) -> Path:
    """Writes a `torch_dist` checkpoint; ranks may share the work, file by file. Returns ``out``.

    One or two chunks are in memory: one is read while another is written. Every file is read back
    from disk and compared with the checksums of what was read from the source.

    Raises `UserError` on every rank if ``out`` is taken or cannot be written, the source cannot be
    read, or a file does not read back as written.
    """
    ranks = ranks or Ranks()
    folder = OutputFolder(out, force=force)
    files = {f"__{number}_0.distcp": file for number, file in enumerate(content.files)}
    own = _share(files, ranks)
    with ExitStack() as stack:
        path = ranks.from_first(lambda: stack.enter_context(folder).path)
        written = ranks.together(
            lambda: _write_files(path, out, own, source, shown=ranks.rank == 0)
        )
        everyones = {
            name: one for of_rank in ranks.gather(written) for name, one in of_rank.items()
        }
        # In the order of the plan, whichever rank wrote which file.
        records = {name: everyones[name] for name in files}
        ranks.from_first(lambda: _finish(folder, records, source, content))
    return out


def _share(files: Mapping[str, File], ranks: Ranks) -> dict[str, File]:
    """This rank's files: the largest first, each to the rank with the least so far."""
    shares: list[dict[str, File]] = [{} for _ in range(ranks.size)]
    sizes = [0] * ranks.size
    for name, file in sorted(files.items(), key=lambda item: -item[1].num_bytes):
        rank = sizes.index(min(sizes))
        shares[rank][name] = file
        sizes[rank] += file.num_bytes
    return shares[ranks.rank]


def _write_files(
    path: Path, out: Path, files: Mapping[str, File], source: WeightSource, *, shown: bool
) -> dict[str, dict[str, Any]]:
    """Writes files into ``path`` and returns their records; checks one while writing the next."""
    records = {}
    with (
        writing(out),
        Progress(
            f"writing {out.name}", sum(file.num_bytes for file in files.values()), shown=shown
        ) as progress,
        ThreadPoolExecutor(1) as finisher,
    ):
        (path / RELEASE).mkdir(exist_ok=True)
        buffers = AlternatingBuffers()
        finished = finisher.submit(lambda: None)
        for name, file in files.items():
            place = path / RELEASE / name
            records[name] = write_file(place, file, source, buffers, on_written=progress.advance)
            finished.result()
            finished = finisher.submit(_sync_and_read_back, place, records[name])
        finished.result()
    return records


def _sync_and_read_back(file: Path, record: dict[str, Any]) -> None:
    sync(file)
    read_back(file, record)


def _finish(
    folder: OutputFolder,
    records: Mapping[str, dict[str, Any]],
    source: WeightSource,
    content: TorchDistContent,
) -> None:
    """Writes everything except the weights, and commits."""
    results: list[WriteResult] = []
    checksums: dict[str, str] = {}
    nans: dict[str, int] = {}
    for name, record in records.items():
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
    """Records a fixed name instead of the temporary folder that is written."""

    @override
    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=RELEASE)
