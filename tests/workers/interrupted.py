"""Runs tools in processes that are killed in the middle, and runs them again.

A process of its own, which imports everything once and forks for every run of a tool.
"""

import contextlib
import importlib
import os
import pickle
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT_EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}


class Moments:
    """Counts the moments at which a process touches the disk, and kills it at one of them.

    A write that is killed has written half. Nothing of Python's runs after the signal.
    """

    def __init__(self, root: Path, kill_at: int | None) -> None:
        self.count = 0
        self._root = str(root)
        self._kill_at = kill_at
        pwrite, fsync = os.pwrite, os.fsync

        def pwrite_counted(descriptor: int, buffer: Any, offset: int) -> int:
            if self._next():
                pwrite(descriptor, buffer[: len(buffer) // 2], offset)
                self._kill()
            return pwrite(descriptor, buffer, offset)

        def fsync_counted(descriptor: int) -> None:
            if self._next():
                self._kill()
            fsync(descriptor)

        vars(os).update(pwrite=pwrite_counted, fsync=fsync_counted)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if event in ROOT_EVENTS and str(arguments[0]).startswith(self._root) and self._next():
            self._kill()

    def _next(self) -> bool:
        self.count += 1
        return self.count == self._kill_at

    @staticmethod
    def _kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def in_child(action: Callable[[], int]) -> int:
    """Runs ``action`` in a fork; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = action()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {tool, arguments, kills, seed}; arguments without --out."""
    from megatron_oprd.errors import UserError

    main = importlib.import_module(f"checkpoint_tools.{case['tool']}").main
    place = directory / f"{case['tool']}_results"
    place.mkdir()
    counted = directory / "moments"

    def tool(out: Path, *, kill_at: int | None = None, max_file_bytes: int | None = None) -> int:
        def action() -> int:
            if max_file_bytes is not None:
                limits = max_file_bytes, resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            moments = Moments(place, kill_at)
            # The ranks' log may be longer than what a file may have here.
            with (
                Path(os.devnull).open("w") as nothing,
                contextlib.redirect_stdout(nothing),
                contextlib.redirect_stderr(nothing),
            ):
                try:
                    code = main([*case["arguments"], "--out", str(out), "--force"])
                except UserError as error:
                    return 2 if "File too large" in str(error) else 3
            counted.write_text(str(moments.count))
            return code

        return in_child(action)

    whole = place / "whole"
    assert tool(whole) == 0
    expected, moments = files_of(whole), int(counted.read_text())
    assert moments > 20, moments
    draw = random.Random(case["seed"])

    # On an empty place.
    out = place / "out"
    for kill_at in sorted(draw.sample(range(1, moments), case["kills"])):
        code = tool(out, kill_at=kill_at)
        assert code in (0, -signal.SIGKILL), (kill_at, code)
        assert not out.exists() or files_of(out) == expected, f"killed at {kill_at}"
    assert tool(out) == 0
    assert files_of(out) == expected
    assert_nothing_else(place)

    # Over a checkpoint, each kill for itself.
    old = {"config.json": b'{"model_type": "llama"}'}
    anywhere = draw.sample(range(1, moments), case["kills"] // 2)
    # The exchange of old and new is among the last.
    late = draw.sample(range(moments - 20, moments), case["kills"] - len(anywhere))
    for kill_at in anywhere + late:
        remove(out)
        out.mkdir()
        (out / "config.json").write_bytes(old["config.json"])
        code = tool(out, kill_at=kill_at)
        assert code in (0, -signal.SIGKILL), (kill_at, code)
        found = files_of(out) if out.exists() else files_of(place / ".out.replaced")
        assert found in (old, expected), f"killed at {kill_at}"
        assert tool(out) == 0
        assert files_of(out) == expected, f"killed at {kill_at}"
        assert_nothing_else(place)

    # A disk that is full, until somebody makes room.
    remove(out)
    largest = max(map(len, expected.values()))
    for share in (0.01, 0.5, 0.99):
        assert tool(out, max_file_bytes=int(largest * share)) == 2
        assert not out.exists()
    assert tool(out) == 0
    assert files_of(out) == expected
    assert_nothing_else(place)


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents by path in the folder; of torch_dist's pickle what is in it, in any order."""
    contents = {}
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.name == ".metadata":
                fields = vars(pickle.loads(content)).items()
                content = repr(
                    {
                        name: sorted(map(str, one.items())) if isinstance(one, dict) else str(one)
                        for name, one in fields
                    }
                ).encode()
            contents[str(path.relative_to(folder))] = content
    return contents


def remove(folder: Path) -> None:
    """Removes a folder with what is in it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def assert_nothing_else(place: Path) -> None:
    """Nothing is left beside the two results."""
    assert {path.name for path in place.iterdir()} == {"out", "whole"}
