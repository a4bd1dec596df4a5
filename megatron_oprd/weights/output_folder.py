"""Output folders that are whole or not there.

While folder ``name`` is written, there are next to it

    .name.<random>.tmp/    becomes ``name``
    .name.lock             held by the process that writes
    .name.replaced/        the old ``name``, for the moment of the exchange
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
# A folder with one of these files, with one of these fields, is a checkpoint: of Hugging Face's
# kind, of these tools, or of Megatron's.
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
    """Checks that a checkpoint may be written to ``out`` and will fit; changes nothing.

    A symbolic link is followed: the folder that it points to is created or replaced, the link
    stays.

    Args:
        out: The folder to be.
        force: Whether a checkpoint that is there is replaced.
        required_bytes: What the result will take. What a killed process has left of the same
            folder will be removed first; a folder that is replaced stays until the new one is
            whole, so its bytes do not count.
        source: What the checkpoint is made of, which it may not replace.

    Raises:
        UserError: ``out`` is or holds the source, is a file or a mount point, is not empty and
            ``force`` is not set, or is not empty and no checkpoint, which ``force`` does not
            replace either; it is in a place that cannot be written to; or the file system has less
            space than is required.
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
        raise UserError(f"output folder {out}: a file has this name; give a folder to create.")
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
            f"output folder {out}: {place} is no folder that can be written to; give another place."
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
    """A folder that is written under another name and gets its own when it is whole.

    ::

        with OutputFolder(out, force=False) as folder:
            ...  # write into folder.path
            folder.commit({...})

    An exception leaves nothing, and what a killed process has left is removed by the next write of
    the same folder. A folder that is replaced stays until the new one is whole and comes back if
    the exchange fails. A process that is killed right between the exchange's two renames leaves it
    under another name, from which the next write brings it back.

    One process at a time writes a folder, held by a lock. Other processes may write files into
    `path` meanwhile.

    Args:
        out: The folder to create; parents are created too. A symbolic link is followed.
        force: Whether a checkpoint that is at ``out`` is replaced.

    Raises:
        UserError: On entering: ``out`` is taken (`check_output_folder`) or another process writes
            it. On every call: the operating system refuses (a full disk, a read-only place).

    Attributes:
        out: The folder to create.
        path: The folder to write into.
    """

    def __init__(self, out: Path, *, force: bool) -> None:
        self.out = out
        self._force = force
        self._target = _resolve(out)
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
        """Adds manifest.json, brings everything to the disk and gives the folder its name.

        Args:
            manifest: The tool, the source and what else is to be known about the result. The
                format's and the package's version are put in front.

        Returns:
            ``out``.
        """
        with writing(self.out):
            write_json(self.path / MANIFEST_FILE, {"format": 1, "written_by": _PACKAGE, **manifest})
            for folder, _, names in os.walk(self.path):
                for name in names:
                    sync(Path(folder, name))
                sync(Path(folder))
            self._exchange()
        # The result is whole and in its place: what cannot be tidied up is no failure.
        shutil.rmtree(self._replaced, ignore_errors=True)
        if self._replaced.exists():
            _logger.warning("%s could not be removed; it is not needed any more", self._replaced)
        return self.out

    def _prepare(self) -> None:
        """Under the lock: tidies up after killed processes, checks, and makes the folder."""
        if self._replaced.exists():  # killed between the two renames of an exchange, or after them
            if self._target.exists():
                shutil.rmtree(self._replaced)
            else:
                self._replaced.rename(self._target)
        check_output_folder(self.out, force=self._force)
        assert self._lock is not None
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
        sync(self._target.parent)


def _resolve(out: Path) -> Path:
    try:
        return out.resolve()
    except (OSError, RuntimeError) as error:  # 3.12 and older raise RuntimeError for a loop
        raise UserError(f"output folder {out}: {error}.") from error


def _left_over(target: Path) -> Iterator[Path]:
    """Folders of processes that were killed while they wrote ``target``."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.tmp")
    if target.parent.is_dir():
        yield from (one for one in target.parent.iterdir() if pattern.fullmatch(one.name))


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**7 else f"{count:,} bytes"
