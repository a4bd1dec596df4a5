"""Runs the image's build without Docker: docker/Dockerfile's steps in a fresh root, with chroot.

    debootstrap --variant=minbase --components=main,universe noble ROOT
    python docker/try_steps.py ROOT --arg MAX_JOBS=2
    python docker/try_steps.py                           # lists the steps and runs none

Commands, their order and their settings are read from the Dockerfile, so that nothing else is tried
than what the image does. All stages share ROOT, which grows to 13 GB, and by pip's downloads while
it installs. Needs Linux's superuser. What stands in for the base image is in docs/installation.md.
Exit codes: 0 if all steps ran, 1 if one failed, 2 for wrong arguments or a Dockerfile that cannot
be followed.
"""

import argparse
import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from steps import Mistake, Stage, State, Step, in_order, read, split

PROJECT = Path(__file__).resolve().parents[1]
# In ROOT: a log for each step. It also tells a used root from a fresh one.
LOGS = "var/log/try_steps"
LAST_LINES = 20
# What NVIDIA's images begin with: CUDA's compiler before the system's folders.
BASE_PATH = "/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Root:
    """The folder that stands in for the image's file system."""

    def __init__(self, path: Path, variables: dict[str, str]) -> None:
        """``variables`` are set for every command, beside the Dockerfile's."""
        self.path = path
        self.variables = variables

    def run(self, command: Sequence[str], state: State, log: str) -> int:
        """Runs a command as a build or a container would; returns its exit code."""
        group, home = self.account(state.user)
        variables = {"HOME": home} | state.arguments | state.environment | self.variables
        words = [
            # Namespaces of its own, so that /proc and left processes go with the command.
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *(f"--root={self.path}", f"--wd={state.folder}"),
            # In the root, since this machine's PATH is what finds `unshare`.
            *("/usr/bin/env", "-i", *(f"{name}={value}" for name, value in variables.items())),
            *("setpriv", f"--reuid={state.user}", f"--regid={group}", "--clear-groups", "--"),
            *command,
        ]
        with (self.path / LOGS / log).open("wb") as output:
            return subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
            ).returncode

    def account(self, user: str) -> tuple[str, str]:
        """Group and home of a user's number; without an account Docker's, which are 0 and /."""
        for line in (self.path / "etc/passwd").read_text().splitlines():
            _, _, number, group, _, home, _ = line.split(":")
            if number == user:
                return group, home
        return "0", "/"

    def copy(self, words: list[str], folder: str) -> None:
        """COPY from the project; ``words`` are the sources and the destination."""
        *sources, target = words
        to = self.path / Path(folder, target).relative_to("/")
        lines = (PROJECT / ".dockerignore").read_text().splitlines()
        left_out = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
        for source in (PROJECT / name for name in sources):
            if source.is_dir():
                # Docker too copies what is in a folder, not the folder.
                ignored = shutil.ignore_patterns(*left_out)
                shutil.copytree(source, to, symlinks=True, dirs_exist_ok=True, ignore=ignored)
            else:
                file = to / source.name if target.endswith("/") else to
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, file)

    def stand_in(self, image: str) -> str:
        """Adds to the root what the image has for the steps; returns what stands in for it."""
        release = re.match(r"nvidia/cuda:(\d+\.\d+\.\d+)-", image)
        if release is None:
            raise Mistake(f"the base is {image}, but only nvidia/cuda:RELEASE-* has a stand-in")
        system = re.search(r'^PRETTY_NAME="(.*)"$', self.read("etc/os-release"), re.MULTILINE)
        assert system is not None
        if (self.path / "usr/local/cuda").exists():
            return f"{system[1]}, with the /usr/local/cuda that is in it"
        toolkit = f"cuda-toolkit[all]=={release[1]}"
        install_cuda(toolkit, self.path / "usr/local/cuda")
        return f"{system[1]}, with PyPI's {toolkit} as /usr/local/cuda"

    def read(self, file: str) -> str:
        """A file's text."""
        return (self.path / file).read_text()


def install_cuda(toolkit: str, cuda: Path) -> None:
    """Makes the folder ``cuda`` of PyPI's packages, with the pip of this Python."""
    wheels = cuda.with_name("cuda-wheels")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "--target", str(wheels), toolkit], check=True)
    (inside,) = wheels.glob("nvidia/cu*")
    # A linker asks for libNAME.so, which the packages leave out.
    for library in inside.glob("lib/*.so.*"):
        plain = library.with_name(library.name.split(".so.")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(library.name)
    (inside / "lib64").symlink_to("lib")
    cuda.symlink_to(inside.relative_to(cuda.parent))


class Build:
    """Follows stages in a root and says of each step what came of it."""

    def __init__(self, root: Root, given: dict[str, str], continue_at: int) -> None:
        """``given`` are the build arguments; steps above line ``continue_at`` have run before."""
        self.root = root
        self.given = given
        self.continue_at = continue_at

    def follow(self, stage: Stage, state: State) -> bool:
        """Follows a stage and changes ``state``; False after a failure."""
        for step in stage.steps:
            announce(stage, step)
            if step.name == "LABEL":
                say("left out: a label changes no file")
            elif step.name in ("RUN", "COPY") and step.line < self.continue_at:
                say("left out: it ran before (--continue-at)")
            elif step.name == "RUN":
                if not self.run([*state.shell, step.text], state, f"{step.line}.log"):
                    return False
            elif step.name == "COPY":
                self.root.copy(state.expand(step).split(), state.folder)
                say("ran")
            else:
                state.set(step, self.given)
                if step.name == "WORKDIR":
                    (self.root.path / state.folder[1:]).mkdir(parents=True, exist_ok=True)
                say("set")
        return True

    def start(self, stage: Stage, state: State) -> bool:
        """Runs what a container of the image would; False if it fails."""
        command = state.entrypoint + state.command
        print(f"{stage.name}, a container's command: {shlex.join(command)}", flush=True)
        return self.run(command, state, f"{stage.name}.log")

    def run(self, command: list[str], state: State, log: str) -> bool:
        """Runs a command and says how that went."""
        begin = time.monotonic()
        code = self.root.run(command, state, log)
        seconds = f"{time.monotonic() - begin:.0f} s"
        if code == 0:
            say(f"ran, {seconds}")
            return True
        file = self.root.path / LOGS / log
        say(f"failed with exit code {code}, {seconds}; the end of {file}:")
        print("\n".join(file.read_text(errors="replace").splitlines()[-LAST_LINES:]))
        return False


def announce(stage: Stage, step: Step) -> None:
    """Prints a step, whole: it is what runs."""
    print(f"line {step.line}, {stage.name}: {step.name} {step.text}", flush=True)


def say(outcome: str) -> None:
    """Prints what came of the step above."""
    print(f"    {outcome}", flush=True)


def try_stages(build: Build, stages: list[Stage]) -> bool:
    """Runs all stages; False if a step failed."""
    states: dict[str, State] = {}
    below = {stage.base for stage in stages}
    for stage in stages:
        if stage.base in states:
            states[stage.name] = copy.deepcopy(states[stage.base])
        else:
            states[stage.name] = State(environment={"PATH": BASE_PATH})
            here = build.root.stand_in(stage.base)
            print(f"{stage.name}: the image {stage.base}")
            say(f"left out: no registry is asked. In its place: {here}")
        if not build.follow(stage, states[stage.name]):
            return False
        # One that others are built on starts nothing.
        if stage.name not in below and not build.start(stage, states[stage.name]):
            return False
    return True


def pairs(option: str, texts: list[str], mark: str) -> dict[str, str]:
    """The values of an option that is a name, a mark and a value."""
    for text in texts:
        if mark not in text:
            raise Mistake(f"{option} {text} has no '{mark}'; give NAME{mark}VALUE")
    return dict(text.split(mark, 1) for text in texts)


def check(root: Path, continue_at: int) -> None:
    """Whether the steps can run in ``root``, and may."""
    if not (root / "etc/os-release").is_file() or root.resolve() == Path("/"):
        raise Mistake(f"{root} is no fresh system; make one with debootstrap (see --help)")
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        raise Mistake("chroot needs the superuser and util-linux's unshare; run it with both")
    if (root / LOGS).exists() and not continue_at:
        raise Mistake(f"{root} has steps in it already; give a fresh one, or --continue-at LINE")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", metavar="ROOT", type=Path, nargs="?", help="a fresh system")
    for option, form, meaning in (
        ("--arg", "NAME=VALUE", "a build argument"),
        ("--env", "NAME=VALUE", "set for every command, such as PIP_INDEX_URL"),
        ("--file", "FILE:IN_ROOT", "copied before the steps, such as a certificate"),
    ):
        parser.add_argument(option, action="append", default=[], metavar=form, help=meaning)
    parser.add_argument(
        "--continue-at", type=int, default=0, metavar="LINE", help="steps above it ran before"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; ``argv`` defaults to the process's arguments."""
    args = parse(argv)
    try:
        given, variables = pairs("--arg", args.arg, "="), pairs("--env", args.env, "=")
        stages = in_order(split(read((PROJECT / "docker/Dockerfile").read_text()), given))
        if args.root is None:
            for stage in stages:
                for step in stage.steps:
                    announce(stage, step)
            return 0
        check(args.root, args.continue_at)
        for file, place in pairs("--file", args.file, ":").items():
            shutil.copy(file, args.root / place.lstrip("/"))
        (args.root / LOGS).mkdir(parents=True, exist_ok=True)
        root = Root(args.root.resolve(), variables)
        return 0 if try_stages(Build(root, given, args.continue_at), stages) else 1
    except (Mistake, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
