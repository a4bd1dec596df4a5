"""The files of a training checkpoint: sizes and checksums, computed in parallel by all ranks."""

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_oprd.weights.checksum import file_checksum

# By path relative to the checkpoint: (bytes, xxh3_128 in hexadecimal).
Files = dict[str, tuple[int, str]]


def describe_checkpoint_files(folder: Path) -> Files:
    """Sizes and checksums of all files below a folder. Every rank has to call.

    Each rank reads a part of the files, about the same number of bytes.
    """
    names = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())]
    # Rank 0's list: a shared file system may show other ranks an older state.
    dist.broadcast_object_list(names)
    sizes = {name: (folder / name).stat().st_size for name in names[0]}
    sums = _checksums(folder, sizes)
    return {name: (sizes[name], sums[name]) for name in names[0]}


def broken_size(folder: Path, files: Mapping[str, tuple[int, str]]) -> str | None:
    """Describes the first file that is missing or has another size, or None; reads no content."""
    for name, (expected, _) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if (found := path.stat().st_size) != expected:
            return f"{path} has {found:,} bytes; {expected:,} were written"
    return None


def broken_content(folder: Path, files: Mapping[str, tuple[int, str]]) -> str | None:
    """Describes a file with another checksum, or None. All ranks have to call; all get the same."""
    sums = _checksums(folder, {name: size for name, (size, _) in files.items()})
    for name, (_, expected) in files.items():
        if sums[name] != expected:
            return f"{folder / name} has other bytes than were written (its checksum differs)"
    return None


def _checksums(folder: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """Checksums of all files on every rank; each rank reads about the same number of bytes."""
    ranks = dist.get_world_size()
    held = [0] * ranks
    own: dict[str, str] = {}
    # Largest first, each to the rank with the least, the same on all ranks without communication.
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = held.index(min(held))
        held[rank] += sizes[name]
        if rank == dist.get_rank():
            own[name] = _readable_checksum(folder / name)
    everyone: list[dict[str, str]] = [{}] * ranks
    dist.all_gather_object(everyone, own)
    return {name: found for of_rank in everyone for name, found in of_rank.items()}


def _readable_checksum(path: Path) -> str:
    # Not raised here: all ranks have to learn of it, or the others would wait in the gather.
    try:
        return file_checksum(path)
    except OSError as error:
        return f"unreadable: {error}"
