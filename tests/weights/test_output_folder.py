import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_oprd.errors import UserError
from megatron_oprd.weights import output_folder
from megatron_oprd.weights.output_folder import (
    OutputFolder,
    check_output_folder,
)

OLD_CONFIG = '{"model_type": "old"}'


class Killed(BaseException):
    """Stands in for the end of the process."""


def write(out: Path, *, force: bool = False, stop_after: int = 99) -> None:
    """Writes three files, or fewer."""
    with OutputFolder(out, force=force) as folder:
        for number, name in enumerate("abc"):
            if number == stop_after:
                raise Killed
            (folder.path / name).write_text(name)
        assert force or not out.exists()
        folder.commit({"tool": "test"})


def old_checkpoint(out: Path) -> Path:
    out.mkdir()
    (out / "config.json").write_text(OLD_CONFIG)
    return out


def test_the_folder_is_whole_and_alone(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert {path.name for path in out.iterdir()} == {"a", "b", "c", "manifest.json"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest == {"format": 1, "written_by": "megatron_oprd 0.1.0", "tool": "test"}


@pytest.mark.parametrize("force", [False, True])
def test_an_exception_leaves_nothing(tmp_path: Path, force: bool) -> None:
    if force:
        old_checkpoint(tmp_path / "out")
    with pytest.raises(Killed):
        write(tmp_path / "out", stop_after=2, force=force)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if force else [])
    assert not force or (tmp_path / "out" / "config.json").read_text() == OLD_CONFIG


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.0123abcd.tmp").mkdir()
    (tmp_path / ".other.0123abcd.tmp").mkdir()
    write(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".other.0123abcd.tmp"}


HOLDER = """
import pathlib, sys, time
from megatron_oprd.weights.output_folder import OutputFolder
with OutputFolder(pathlib.Path(sys.argv[1]), force=False) as folder:
    print("in", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "in\n"
        with pytest.raises(UserError, match=rf"out is being written by process {holder.pid} on"):
            write(out)
    finally:
        holder.kill()
        holder.wait()
    write(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_replaces_only_with_force(tmp_path: Path) -> None:
    out = old_checkpoint(tmp_path / "out")
    with pytest.raises(UserError, match=r"out is not empty; give another folder, or --force"):
        write(out)
    write(out, force=True)
    assert not (out / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failing_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = old_checkpoint(tmp_path / "out")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise PermissionError("no")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing)
        with pytest.raises(UserError, match=r"cannot write .*out: no"):
            write(out, force=True)
    assert (out / "config.json").read_text() == OLD_CONFIG
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    write(out, force=True)


def test_killed_in_the_exchange(tmp_path: Path) -> None:
    """Between the renames the old folder has another name; the next write finds it."""
    out = old_checkpoint(tmp_path / "out")
    out.rename(tmp_path / ".out.replaced")
    with pytest.raises(UserError, match="out is not empty"):
        write(out)
    assert (out / "config.json").read_text() == OLD_CONFIG

    old_checkpoint(tmp_path / ".out.replaced")
    write(out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_and_its_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    old_checkpoint(tmp_path / "disk" / "real")
    link = tmp_path / "link"
    link.symlink_to("disk/real")
    with pytest.raises(UserError, match="link is not empty"):
        write(link)
    write(link, force=True)
    assert link.readlink() == Path("disk/real")
    assert (tmp_path / "disk/real/a").read_text() == "a"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]

    dangling = tmp_path / "dangling"
    dangling.symlink_to("disk/new")
    write(dangling)
    assert (tmp_path / "disk/new/a").read_text() == "a"

    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"loop.*(S|s)ymlink|symbolic"):
        write(tmp_path / "loop")


def test_places_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("x")
    with pytest.raises(
        UserError, match=r"has neither .* config.json nor .*, so it is no checkpoint"
    ):
        check_output_folder(tmp_path, force=True)
    with pytest.raises(UserError, match=r"is a file"):
        check_output_folder(thesis, force=True)
    with pytest.raises(UserError, match=r"thesis.tex is not a folder that can be written to"):
        check_output_folder(thesis / "out", force=False)
    check_output_folder(tmp_path / "new" / "deep", force=False)

    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path.name == "volume")
    with pytest.raises(UserError, match=r"volume is a mount point"):
        check_output_folder(tmp_path / "volume", force=False)


def test_read_only_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A read-only file system answers so to everybody, and permissions do not stop root.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path} is not a folder that can be written to"):
        check_output_folder(tmp_path / "deep" / "out", force=False)
    with pytest.raises(UserError, match="cannot write /proc/out: "):
        OutputFolder(Path("/proc/out"), force=False).__enter__()


def test_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(free=10**9)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: free)
    out = tmp_path / "deep" / "out"
    check_output_folder(out, force=False, required_bytes=10**9)
    message = rf"needs 1.10 GB; the file system of {tmp_path} has 1.00 GB left"
    with pytest.raises(UserError, match=message):
        check_output_folder(out, force=False, required_bytes=11 * 10**8)

    half_done = tmp_path / ".out.0123abcd.tmp"
    half_done.mkdir()
    (half_done / "shard").write_bytes(os.urandom(2**20))
    check_output_folder(tmp_path / "out", force=False, required_bytes=10**9 + 2**20)
    with pytest.raises(UserError, match=r"has 1.00 GB left"):
        check_output_folder(tmp_path / "out", force=False, required_bytes=10**9 + 2**21)


@pytest.mark.parametrize("name", ["source", "."])
def test_the_source_is_never_replaced(tmp_path: Path, name: str) -> None:
    outer = tmp_path / "outer"
    source = outer / "source"
    source.mkdir(parents=True)
    for folder in (outer, source):
        (folder / "config.json").write_text('{"model_type": "llama"}')
    link = tmp_path / "link"
    link.symlink_to(outer)
    for out in (outer / name, link / name):
        with pytest.raises(UserError, match="is or holds the source"):
            check_output_folder(out, force=True, source=source)
    check_output_folder(outer, force=True, source=tmp_path / "elsewhere")


def test_a_megatron_checkpoint_is_replaced(tmp_path: Path) -> None:
    for number, (name, content) in enumerate(
        (
            ("metadata.json", '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'),
            ("latest_checkpointed_iteration.txt", "release"),
            ("latest_checkpointed_iteration.txt", "1200\n"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(UserError, match="is not empty; give another folder, or --force"):
            write(folder)
        write(folder, force=True)
        assert not (folder / name).exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", '{"name": "web app"}'),
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("metadata.json", '{"title": "thesis"}'),
        ("latest_checkpointed_iteration.txt", "soon"),
    ],
)
def test_other_folders_with_such_files_are_not_replaced(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="is no checkpoint that --force would replace"):
        check_output_folder(tmp_path, force=True)
