"""Breaks the code in one place after another, and looks whether a test notices.

    make mutation
    python -m tests.mutations.run [--only NAME ...] [--report FILE]

Each mutation of mutations.json is made in a copy of the tree, and its tests are run there, the
quickest first, until one fails. One that no test notices is a survivor; those that are known, with
the reason why, are in the file. The exit code is 1 if less than 95% are killed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("mutations.json")
LEAST_KILLED = 0.95


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One way to break the code.

    Attributes:
        name: Its name.
        file: The file that is changed.
        old: Text that the file has exactly once.
        new: What stands there instead.
        what: What is wrong then.
        tests: Test files that may notice, the quickest first.
        survives: Why no test notices; empty if one has to.
    """

    name: str
    file: str
    old: str
    new: str
    what: str
    tests: list[str]
    survives: str = ""


def load() -> list[Mutation]:
    """Reads the mutations; each has to fit the code as it is.

    Raises:
        SystemExit: One does not.
    """
    mutations = [Mutation(**one) for one in json.loads(FILE.read_text())]
    for one in mutations:
        if (count := (ROOT / one.file).read_text().count(one.old)) != 1:
            raise SystemExit(f"{one.name}: {one.file} has {one.old!r} {count} times, not once")
    return mutations


def killed_by(mutation: Mutation, tree: Path) -> str | None:
    """The test that notices a mutation; None if none does."""
    file = tree / mutation.file
    before = file.read_text()
    file.write_text(before.replace(mutation.old, mutation.new))
    try:
        for test in mutation.tests:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test],
                cwd=tree,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 1:
                failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
                return failed[0].split()[1].split(" - ")[0] if failed else test
            if done.returncode != 0:
                raise SystemExit(f"{mutation.name}: {test} did not run:\n{done.stdout[-2000:]}")
    finally:
        file.write_text(before)
    return None


def copy_of_tree(folder: Path) -> Path:
    """The files that git knows, in a folder of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    if (ROOT / ".cache").is_dir():
        (folder / ".cache").symlink_to(ROOT / ".cache")
    return folder


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations.run")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--report", type=Path, metavar="FILE", help="the table as Markdown")
    arguments = parser.parse_args()
    mutations = [one for one in load() if not arguments.only or one.name in arguments.only]
    found: list[tuple[Mutation, str | None]] = []
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_tree(Path(folder))
        for number, one in enumerate(mutations, start=1):
            started = time.monotonic()
            found.append((one, killed_by(one, tree)))
            seconds = time.monotonic() - started
            print(
                f"{number} of {len(mutations)}  {one.name}: {found[-1][1] or 'SURVIVES'}  "
                f"({seconds:.0f} s)",
                flush=True,
            )
    table = Table("mutation", "file", "killed by")
    for one, test in found:
        table.add_row(one.name, one.file, test or f"survives: {one.survives or 'not known why'}")
    Console(width=180).print(table)
    if arguments.report is not None:
        lines = ["| mutation | file | killed by |", "|---|---|---|"]
        for one, test in found:
            by = f"`{test}`" if test else f"survives: {one.survives or 'not known why'}"
            lines.append(f"| {one.name} | {one.file} | {by} |")
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        arguments.report.write_text("\n".join(lines) + "\n")
    killed = sum(test is not None for _, test in found)
    print(f"{killed} of {len(found)} killed: {killed / len(found):.1%}")
    return int(killed < LEAST_KILLED * len(found))


if __name__ == "__main__":
    sys.exit(main())
