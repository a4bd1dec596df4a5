"""The files of a training checkpoint: sizes and checksums, taken and compared by all ranks."""

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_oprd.weights.checksum import file_checksum

# By path below the checkpoint: bytes, and xxh3_128 in hexadecimal.
Files = dict[str, tuple[int, str]]


def describe_checkpoint_files(folder: Path) -> Files:
    """Sizes and checksums of all files below a folder. Every rank has to call.

    The ranks share out the files, so that a checkpoint of N ranks is read by N ranks.
    """
    names = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())]
    dist.broadcast_object_list(names)
    sizes = {name: (folder / name).stat().st_size for name in names[0]}
    sums = _checksums(folder, sizes)
    return {name: (sizes[name], sums[name]) for name in names[0]}


def broken_size(folder: Path, files: Mapping[str, tuple[int, str]]) -> str | None:
    """Which file is missing or has another size, and what was found; reads no content."""
    for name, (expected, _) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if (found := path.stat().st_size) != expected:
            return f"{path} has {found:,} bytes; {expected:,} were written"
    return None


def broken_content(folder: Path, files: Mapping[str, tuple[int, str]]) -> str | None:
    """Which file has another checksum. Every rank has to call; the answer is the same on all."""
    sums = _checksums(folder, {name: size for name, (size, _) in files.items()})
    for name, (_, expected) in files.items():
        if sums[name] != expected:
            return f"{folder / name} has other bytes than were written (its checksum differs)"
    return None


def _checksums(folder: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """Checksums of files, of which every rank reads about the same number of bytes."""
    ranks = dist.get_world_size()
    held = [0] * ranks
    own: dict[str, str] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = held.index(min(held))
        held[rank] += sizes[name]
        if rank == dist.get_rank():
            own[name] = _readable_checksum(folder / name)
    everyone: list[dict[str, str]] = [{}] * ranks
    dist.all_gather_object(everyone, own)
    return {name: found for of_rank in everyone for name, found in of_rank.items()}


def _readable_checksum(path: Path) -> str:
    # A disk that fails to read is found here; all ranks have to hear of it, so it is no exception.
    try:
        return file_checksum(path)
    except OSError as error:
        return f"unreadable: {error}"
