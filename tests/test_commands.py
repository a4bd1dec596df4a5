import importlib.util
import subprocess
import sys

import pytest

from megatron_oprd.__main__ import COMMANDS
from tests.helpers.ranks import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_oprd", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("module", [module for module, _ in COMMANDS.values()])
def test_every_command_is_a_module(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_arguments_are_the_commands() -> None:
    done = run("train", "--config", "missing.yaml", "--dry-run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --config missing.yaml cannot be read")


def test_a_wrong_command_and_help() -> None:
    wrong = run("trian")
    assert wrong.returncode == 2
    assert "invalid choice: 'trian'" in wrong.stderr
    shown = run("--help")
    assert shown.returncode == 0
    assert all(f"  {name} " in shown.stdout for name in COMMANDS)
