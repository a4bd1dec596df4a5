"""Output folders that appear whole or not at all.

While folder ``name`` is written, its parent also has

    .name.<random>.tmp/    becomes ``name``
    .name.lock             held by the writing process
    .name.replaced/        the old ``name``, during the exchange only
"""

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import megatron_oprd
from megatron_oprd.errors import UserError
from megatron_oprd.weights.disk import FileLock, bytes_on_disk, sync, write_json, writing
from megatron_oprd.weights.torch_dist_files import FORMAT_FILE, TRACKER_FILE, read_tracker

MANIFEST_FILE = "manifest.json"
# Any of these files with any of its fields marks a checkpoint: of Hugging Face, these tools, or
# Megatron. --force replaces only such folders and those with Megatron's tracker file.
_MARKS_OF_A_CHECKPOINT = {
    "config.json": ("model_type", "architectures"),
    MANIFEST_FILE: ("written_by",),
    FORMAT_FILE: ("sharded_backend",),
}
_PACKAGE = f"{megatron_oprd.__name__} {megatron_oprd.__version__}"

_logger = logging.getLogger(__name__)


def check_output_folder(
    out: Path, *, force: bool, required_bytes: int | None = None, source: Path | None = None
) -> None:
    """Checks that a checkpoint may be written to ``out`` and fits; changes nothing.

    A symbolic link is followed: its target is created or replaced, the link stays.

    Args:
        out: The output folder.
        force: Allows replacing a checkpoint at ``out``.
        required_bytes: Size of the result. Leftovers of killed writers of ``out`` count as free; a
            folder to be replaced does not, because it stays until the new one is whole.
        source: The source of the checkpoint, which ``out`` must not replace.

    Raises:
        UserError: ``out`` is or contains the source, is a file or mount point, is not empty (with
            ``force``: and is not a checkpoint), cannot be written, or does not fit.
    """
    if source is not None and _resolve(out) in (source.resolve(), *source.resolve().parents):
        raise UserError(
            f"output folder {out} is or holds the source {source}, which it would replace; give "
            "another folder."
        )
    with writing(out):
        _check_place(out, _resolve(out), force=force, required_bytes=required_bytes)


def _check_place(out: Path, target: Path, *, force: bool, required_bytes: int | None) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"output folder {out} is a file; give a folder to create.")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise UserError(
                f"output folder {out} is not empty; give another folder, or --force to replace it."
            )
        if not _is_checkpoint(target):
            raise UserError(
                f"output folder {out} is not empty and has neither a model's config.json nor a "
                f"{MANIFEST_FILE} of these tools nor Megatron's {FORMAT_FILE} or {TRACKER_FILE}, "
                "so it is no checkpoint that --force would replace; give another folder."
            )
    if target.is_dir() and os.path.ismount(target):
        raise UserError(
            f"output folder {out} is a mount point, which no finished folder can be moved to; give "
            "a folder inside it."
        )
    place = target.parent
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise UserError(
            f"output folder {out} cannot be written, because {place} is not a folder that can be "
            "written to; give another place."
        )
    if required_bytes is not None:
        available = shutil.disk_usage(place).free + sum(map(bytes_on_disk, _left_over(target)))
        if available < required_bytes:
            raise UserError(
                f"output folder {out} needs {_size(required_bytes)}; the file system of "
                f"{place} has {_size(available)} left. Free some space, or give another place."
            )


def _is_checkpoint(folder: Path) -> bool:
    for name, fields in _MARKS_OF_A_CHECKPOINT.items():
        try:
            content = json.loads((folder / name).read_bytes())
        except (FileNotFoundError, ValueError):
            continue
        if isinstance(content, dict) and any(field in content for field in fields):
            return True
    return read_tracker(folder) is not None


class OutputFolder:
    """Writes a folder under a temporary name and renames it when it is whole.

    ::

        with OutputFolder(out, force=False) as folder:
            ...  # write into folder.path
            folder.commit({...})

    An exception leaves nothing; the next write of the same folder removes the leftovers of killed
    processes. A replaced folder stays until the new one is whole and returns if the exchange fails.
    If the process is killed between the exchange's two renames, the next write restores it. A lock
    admits one process at a time; others may write files into `path` meanwhile.

    Raises:
        UserError: On entry, ``out`` is taken (`check_output_folder`) or being written. On any call,
            the operating system refuses (disk full, read-only).
    """

    def __init__(self, out: Path, *, force: bool) -> None:
        self.out = out
        self._force = force
        self._target = _resolve(out)
        # Next to the target, so on the same file system, where a rename is atomic.
        self.path = _beside(self._target, f"{uuid.uuid4().hex[:8]}.tmp")
        self._replaced = _beside(self._target, "replaced")
        self._lock: FileLock | None = None

    def __enter__(self) -> Self:
        with writing(self.out):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(_beside(self._target, "lock"), self.out)
            try:
                self._prepare()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        assert self._lock is not None
        self._lock.release()

    def commit(self, manifest: Mapping[str, Any]) -> Path:
        """Adds manifest.json, syncs everything and renames the folder; returns ``out``.

        ``manifest`` names the tool, the source and so on. Versions of the manifest's format and of
        this package are added in front.
        """
        with writing(self.out):
            write_json(self.path / MANIFEST_FILE, {"format": 1, "written_by": _PACKAGE, **manifest})
            for folder, _, names in os.walk(self.path):
                for name in names:
                    sync(Path(folder, name))
                # Also the folder: its entries are data of their own.
                sync(Path(folder))
            self._exchange()
        # The result is in place, so a failed cleanup is not an error.
        shutil.rmtree(self._replaced, ignore_errors=True)
        if self._replaced.exists():
            _logger.warning("%s could not be removed; it is not needed any more", self._replaced)
        return self.out

    def _prepare(self) -> None:
        """With the lock held: cleans up after killed processes, checks, creates the folder."""
        if self._replaced.exists():  # killed between the two renames of an exchange, or after them
            if self._target.exists():
                shutil.rmtree(self._replaced)
            else:
                self._replaced.rename(self._target)
        check_output_folder(self.out, force=self._force)
        assert self._lock is not None
        # Without locks these could be of a process that is still writing.
        if self._lock.is_held:
            for folder in list(_left_over(self._target)):
                shutil.rmtree(folder)
        self.path.mkdir()

    def _exchange(self) -> None:
        if self._target.exists():
            self._target.rename(self._replaced)
        try:
            self.path.rename(self._target)
        except BaseException:
            if self._replaced.exists():
                self._replaced.rename(self._target)
            raise
        # Makes the renames durable.
        sync(self._target.parent)


def _resolve(out: Path) -> Path:
    try:
        return out.resolve()
    except (OSError, RuntimeError) as error:  # 3.12 and older raise RuntimeError for a loop
        raise UserError(f"output folder {out}: {error}.") from error


def _left_over(target: Path) -> Iterator[Path]:
    """Temporary folders of killed writers of ``target``."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.tmp")
    if target.parent.is_dir():
        yield from (one for one in target.parent.iterdir() if pattern.fullmatch(one.name))


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**7 else f"{count:,} bytes"
