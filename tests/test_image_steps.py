"""docker/try_steps.py: how it reads and follows the Dockerfile. Nothing is run in another root."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.ranks import ROOT

SCRIPT = ROOT / "docker/try_steps.py"
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
VENV = "/opt/venv/bin:/usr/local/cuda/bin:"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docker")
    return importlib.import_module("try_steps")


def lines_of(name: str) -> set[int]:
    """Where an instruction begins: none of its own lines looks like the beginning of another."""
    lines = enumerate(DOCKERFILE.splitlines(), 1)
    return {number for number, line in lines if line.startswith(f"{name} ")}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False
    )


def test_every_step_is_listed() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    for name in ("RUN", "COPY", "ENV", "WORKDIR", "USER", "CMD"):
        found = re.findall(rf"^line (\d+), \w+: {name} .", done.stdout, re.MULTILINE)
        assert len(found) == len(set(found))
        assert {int(number) for number in found} == lines_of(name) != set()


def test_the_listed_commands_are_whole() -> None:
    """Each is a command of bash, and ends as in the file."""
    commands = re.findall(r"^line \d+, \w+: RUN (.+)$", run().stdout, re.MULTILINE)
    assert any(command.endswith("tini && rm -rf /var/lib/apt/lists/*") for command in commands)
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arg", "JOBS=2"], "--arg JOBS: the Dockerfile has APEX_REF, BASE, "),
        (["--arg", "MAX_JOBS"], "--arg MAX_JOBS has no '='; give NAME=VALUE"),
        (["/"], "/ is no fresh system; make one with debootstrap"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ADD a b", "line 2: ADD is not known here"),
        ("RUN --mount=type=cache,target=/c true", "line 2: options and here-documents"),
        ("RUN cat <<END", "line 2: options and here-documents"),
        ("ENV A=$B", "line 2: no ARG or ENV above it sets B"),
        ("ENV A=${B:-c}", "line 2: of variables only ${NAME}"),
        ("CMD python", "line 2: CMD has to be a JSON list"),
        ("USER oprd", "line 2: USER oprd has to be a number"),
    ],
)
def test_what_cannot_be_followed_is_refused(tool: ModuleType, line: str, message: str) -> None:
    def follow_line() -> None:
        (stage,) = tool.split(tool.read(f"FROM scratch AS one\n{line}\n"), {})
        tool.State(environment={}).set(stage.steps[0], {})

    with pytest.raises(tool.Mistake, match=re.escape(message)):
        follow_line()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A system as far as the tool itself reads it, with CUDA, so that none is fetched."""
    for folder in ("etc", "usr/local/cuda", "var/log/try_steps"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "etc/os-release").write_text('NAME="A"\nPRETTY_NAME="A 1"\n')
    accounts = "root:x:0:0::/root:/bin/sh\noprd:x:10001:10002::/home/oprd:/bin/sh\n"
    (tmp_path / "etc/passwd").write_text(accounts)
    return tmp_path


def follow(
    tool: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch, *, fails: str = "nothing"
) -> tuple[bool, list[tuple[str, Any]]]:
    """Follows the Dockerfile; of each command the last words and the state that it ran in."""
    commands: list[tuple[str, Any]] = []

    def record(self: Any, command: list[str], state: Any, log: str) -> int:
        (self.path / tool.LOGS / log).write_text("its output\n")
        commands.append((command[-1], tool.copy.deepcopy(state)))
        return 3 if fails in command[-1] else 0

    monkeypatch.setattr(tool.Root, "run", record)
    given: dict[str, str] = {"MAX_JOBS": "7"}
    stages = tool.in_order(tool.split(tool.read(DOCKERFILE), given))
    return tool.try_stages(tool.Build(tool.Root(root, {}), given, 0), stages), commands


def test_commands_have_what_the_lines_above_set(
    tool: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, commands = follow(tool, root, monkeypatch)
    assert done
    # A container is started of the release and of the image for tests.
    assert len(commands) == len(lines_of("RUN")) + 2
    texts = [text for text, _ in commands]
    states = dict(commands)
    packages = states["docker/install_packages.sh constraints/gpu.txt"]
    assert packages.folder == "/opt/megatron-oprd"
    assert packages.environment["PATH"].startswith(VENV)
    expected = {"BASE": "cuda", "MAX_JOBS": "7", "NVTE_CUDA_ARCHS": "90;100", "APEX_REF": ""}
    assert expected.items() <= packages.arguments.items()
    assert "HF_HOME" not in packages.environment
    help_ = states["--help"]
    assert help_.entrypoint + help_.command == [
        *("tini", "--", "python", "-m", "megatron_oprd.train", "--help")
    ]
    assert (help_.user, help_.folder) == ("10001", "/work")
    assert help_.environment["HF_HOME"] == "/cache/huggingface"
    # The stage for tests goes on from the package, not from the release.
    assert texts.index("--help") < texts.index("tests/gpu") == len(texts) - 1
    assert states["tests/gpu"].entrypoint == []
    assert states["tests/gpu"].folder == "/opt/megatron-oprd"


def test_what_is_copied(tool: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(tool, root, monkeypatch)
    project = root / "opt/megatron-oprd"
    for file in ("megatron_oprd/train.py", "LICENSE", "constraints/gpu.txt", "tests/gpu"):
        assert (project / file).exists(), file
    assert not list(project.rglob("__pycache__"))


def test_a_failed_step_ends_it(
    tool: ModuleType,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done, commands = follow(tool, root, monkeypatch, fails="useradd")
    assert not done
    assert "useradd" in commands[-1][0]
    *_, failure, output = capsys.readouterr().out.splitlines()
    assert failure.startswith("    failed with exit code 3, 0 s; the end of ")
    assert output == "its output"


def test_another_base_has_no_stand_in(
    tool: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"BASE": "ngc", "NGC_IMAGE": "somewhere/pytorch:1"}
    stages = tool.in_order(tool.split(tool.read(DOCKERFILE), given))
    with pytest.raises(tool.Mistake, match="the base is somewhere/pytorch:1, but only nvidia/cuda"):
        tool.try_stages(tool.Build(tool.Root(root, {}), given, 0), stages)


def test_an_accounts_group_and_home(tool: ModuleType, root: Path) -> None:
    system = tool.Root(root, {})
    assert system.account("10001") == ("10002", "/home/oprd")
    assert system.account("5") == ("0", "/")
