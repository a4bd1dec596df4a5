"""Output folders that are whole or not there, and whose writing goes on after an interruption.

While folder ``name`` is written, there are beside it

    .name.partial/             .name.<random>.tmp/ where it cannot be continued
        fingerprint.json       what the result depends on, and the package's version
        journal-<rank>.jsonl   the units that are done, one a line
        content/               becomes ``name``
    .name.lock                 held by the process that writes
    .name.replaced/            what was at ``name``, for the moment of the exchange
"""

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import megatron_oprd
from megatron_oprd.errors import UserError
from megatron_oprd.weights.disk import FileLock, bytes_on_disk, sync, write_json, writing
from megatron_oprd.weights.journals import Journals, any_done
from megatron_oprd.weights.torch_dist_files import FORMAT_FILE, TRACKER_FILE, read_tracker

MANIFEST_FILE = "manifest.json"
_FINGERPRINT_FILE = "fingerprint.json"
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
        required_bytes: What the result will take. What an interrupted write of the same folder
            already takes is not needed again, whether it will be continued or discarded; a folder
            that is replaced stays until the new one is whole, so its bytes do not count.
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
        partial = _beside(target, "partial")
        available = shutil.disk_usage(place).free + bytes_on_disk(partial)
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

        with OutputFolder(out, force=False, fingerprint={...}) as folder:
            for unit in units:
                if folder.done(unit) is None:
                    ...  # write into folder.path
                    folder.finish_unit(unit, {...}, files=[...])
            folder.commit({...})

    With a fingerprint, an interrupted write is continued by the next one that has an equal
    fingerprint and the same version of this package, and discarded by any other. A unit whose
    files are missing or have another size by then is written again. After an exception the units
    that are done stay on disk for that; where none is done, nothing stays. Without a fingerprint an
    exception leaves nothing, and what a killed process left is removed by the next write of the
    same folder.

    A folder that is replaced stays until the new one is whole and comes back if the exchange
    fails; a process that is killed right between the exchange's two renames leaves it under
    another name, from which the next write brings it back.

    One process at a time writes a folder, held by a lock. Several ranks may share one write: rank
    0 enters first and commits last, the caller's barriers lie between. Every rank has a journal.

    Args:
        out: The folder to create; parents are created too. A symbolic link is followed.
        force: Whether a checkpoint that is at ``out`` is replaced.
        fingerprint: JSON of everything the result depends on: the source's files
            (`disk.describe_files`), settings. The package's version is added. A write without one
            cannot be continued, nor shared by ranks.
        rank: This process among those that share the write.

    Raises:
        UserError: On entering: ``out`` is taken (`check_output_folder`) or another process writes
            it. On every call: the operating system refuses (a full disk, a read-only place).
    """

    def __init__(
        self, out: Path, *, force: bool, fingerprint: Mapping[str, Any] | None, rank: int = 0
    ) -> None:
        assert rank == 0 or fingerprint is not None, "ranks find each other by the fingerprint"
        self.out = out
        self._force = force
        self._rank = rank
        # As it reads back from a file: lists for tuples, text for keys.
        self._fingerprint = (
            None
            if fingerprint is None
            else json.loads(json.dumps({"written_by": _PACKAGE, "content": fingerprint}))
        )
        self._target = _resolve(out)
        suffix = "partial" if fingerprint is not None else f"{uuid.uuid4().hex[:8]}.tmp"
        self._partial = _beside(self._target, suffix)
        self._replaced = _beside(self._target, "replaced")
        self._journals: Journals | None = None
        self._lock: FileLock | None = None
        self._committed = False

    @property
    def path(self) -> Path:
        """The folder to write into."""
        return self._partial / "content"

    def __enter__(self) -> Self:
        with writing(self.out):
            if self._rank == 0:
                self._target.parent.mkdir(parents=True, exist_ok=True)
                self._lock = FileLock(_beside(self._target, "lock"), self.out)
            try:
                if self._rank == 0:
                    self._prepare()
                assert self.path.is_dir(), "rank 0 has to enter first"
                self._journals = Journals(self._partial, self.path, self._rank)
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._rank == 0 and not self._committed:
                if self._fingerprint is None or not any_done(self._partial):
                    shutil.rmtree(self._partial, ignore_errors=True)
                else:
                    _logger.warning(
                        "%s is not finished; what is done of it stays in %s, and the same command "
                        "goes on from there",
                        self.out,
                        self._partial,
                    )
        finally:
            self._release()

    def done(self, unit: str) -> dict[str, Any] | None:
        """The record of ``unit`` if it is done, by any rank, in this write or one it continues.

        What an earlier write has done counts if its files had the same sizes when this one began.
        """
        assert self._journals is not None, "done outside of the with block"
        return self._journals.done(unit)

    def finish_unit(self, unit: str, record: Mapping[str, Any], *, files: Iterable[Path]) -> None:
        """Notes that ``unit`` is done, so that it need not be written again.

        Args:
            unit: Its name, free to choose.
            record: JSON to keep with it, such as checksums for the manifest.
            files: The unit's files, under `path`; they reach the disk before the note does, which
                has their sizes.
        """
        assert self._journals is not None, "finish_unit outside of the with block"
        with writing(self.out):
            self._journals.note(unit, record, files)

    def commit(self, manifest: Mapping[str, Any]) -> Path:
        """Adds manifest.json, brings everything to the disk and gives the folder its name.

        Only rank 0 commits, after every rank has finished its units.

        Args:
            manifest: The tool, the source and what else is to be known about the result. The
                format's and the package's version are put in front.

        Returns:
            ``out``.
        """
        assert self._rank == 0, "rank 0 commits"
        with writing(self.out):
            write_json(self.path / MANIFEST_FILE, {"format": 1, "written_by": _PACKAGE, **manifest})
            for folder, _, names in os.walk(self.path):
                for name in names:
                    sync(Path(folder, name))
                sync(Path(folder))
            self._exchange()
        self._committed = True
        # The result is whole and in its place: what cannot be tidied up is no failure.
        for leftover in (self._replaced, self._partial):
            shutil.rmtree(leftover, ignore_errors=True)
            if leftover.exists():
                _logger.warning("%s could not be removed; it is not needed any more", leftover)
        return self.out

    def _prepare(self) -> None:
        """Under the lock: tidies up after killed processes, checks, and starts or continues."""
        if self._replaced.exists():  # killed between the two renames of an exchange, or after them
            if self._target.exists():
                shutil.rmtree(self._replaced)
            else:
                self._replaced.rename(self._target)
        check_output_folder(self.out, force=self._force)
        assert self._lock is not None
        if self._lock.is_held:
            pattern = re.compile(re.escape(f".{self._target.name}.") + r"[0-9a-f]{8}\.tmp")
            for sibling in list(self._target.parent.iterdir()):
                if pattern.fullmatch(sibling.name):
                    shutil.rmtree(sibling)
        if self._can_continue():
            return
        if self._partial.exists():
            shutil.rmtree(self._partial)
        self.path.mkdir(parents=True)
        if self._fingerprint is not None:
            write_json(self._partial / _FINGERPRINT_FILE, self._fingerprint)
            sync(self._partial / _FINGERPRINT_FILE)

    def _can_continue(self) -> bool:
        if self._fingerprint is None or not self.path.is_dir():
            return False
        try:
            text = (self._partial / _FINGERPRINT_FILE).read_text(encoding="utf-8")
            return json.loads(text) == self._fingerprint
        except (FileNotFoundError, ValueError):  # killed while it was written
            return False

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

    def _release(self) -> None:
        if self._journals is not None:
            self._journals.close()
            self._journals = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _resolve(out: Path) -> Path:
    try:
        return out.resolve()
    except (OSError, RuntimeError) as error:  # 3.12 and older raise RuntimeError for a loop
        raise UserError(f"output folder {out}: {error}.") from error


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**7 else f"{count:,} bytes"
