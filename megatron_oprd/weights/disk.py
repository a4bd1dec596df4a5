"""Operating-system side of a safe write: locks, syncing, readable errors."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_oprd.errors import UserError

# flock's error codes on file systems without locks (NFS without lockd, Lustre without -o flock).
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

_logger = logging.getLogger(__name__)


def describe_files(files: Iterable[Path]) -> dict[str, list[int]]:
    """A fingerprint of files: [size in bytes, modification time in ns] by absolute path."""
    described = {}
    for file in files:
        status = file.stat()
        described[str(file.absolute())] = [status.st_size, status.st_mtime_ns]
    return described


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names ``out``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}.") from error


def write_json(path: Path, content: Any) -> None:
    """Writes JSON with indentation, for people to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Waits until the file or folder ``path`` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse to sync folders, and do not need it.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def bytes_on_disk(folder: Path) -> int:
    """Bytes allocated to the files under ``folder``; 0 if it does not exist."""
    return sum(
        # st_blocks counts units of 512 bytes, whatever the file system's block size.
        Path(path, name).stat().st_blocks * 512
        for path, _, names in os.walk(folder)
        for name in names
    )


class FileLock:
    """A lock file, held from construction on; the kernel frees it when its process ends."""

    is_held: bool  # False if the file system has no locks; a warning is logged

    def __init__(self, path: Path, out: Path) -> None:
        self._path = path
        while True:
            # Not truncated yet: if the lock is taken, the file names its holder.
            self._stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
            try:
                self.is_held = self._try(out)
                # The previous holder unlinks the file on release. A lock on the unlinked file
                # excludes nobody, because the next process creates a new file. So try again.
                if _is_at(self._stream, path):
                    break
            except BaseException:
                self._stream.close()
                raise
            self._stream.close()
        self._stream.truncate(0)
        self._stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._stream.flush()

    def release(self) -> None:
        """Removes the file and frees the lock."""
        # Unlinked while still locked: after the close it could be another process's lock.
        self._path.unlink(missing_ok=True)
        self._stream.close()

    def _try(self, out: Path) -> bool:
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            writer = self._stream.read() or "another process"
            raise UserError(
                f"output folder {out} is being written by {writer}; wait for it to end, or give "
                "another folder."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _logger.warning(
                "the file system of %s has no locks (%s): make sure that nothing else writes it",
                out,
                error.strerror,
            )
            return False
        return True


def _is_at(stream: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
