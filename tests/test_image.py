"""The image: what its build copies, and what it installs. Docker itself is not needed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT

DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
SCRIPT = ROOT / "docker/install_packages.sh"
RELEASES = ROOT / "constraints/gpu.txt"
EXTENSION = "transformer-engine-torch"


def copied() -> list[str]:
    """What the COPY lines name, without their destinations."""
    lines = re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def test_everything_copied_is_there_and_sent_to_the_build() -> None:
    admitted = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert copied()
    for source in copied():
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in admitted, f".dockerignore leaves {source} out"


def test_environments_and_models_are_not_sent() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in lines if not line.startswith("#")) == "*"
    assert not {"!.venv", "!.cache", "!runs", "!.git"} & set(lines)


def test_the_releases_are_below_the_sources() -> None:
    """A layer is built again when a line above it changes."""
    assert DOCKERFILE.index("RUN docker/install_packages.sh") < DOCKERFILE.index("COPY megatron")


def install(folder: Path, **settings: str) -> tuple[list[list[str]], str]:
    """Runs the script with a stand-in for pip.

    Returns pip's calls, a requirements file replaced by the names in it, and stderr.
    """
    pip = folder / "pip"
    pip.write_text(
        "#!/usr/bin/env bash\n"
        f"for word in \"$@\"; do if [ -f \"$word\" ]; then sed 's/==.*//' \"$word\" | tr '\\n' ' ';"
        f" else printf '%s ' \"$word\"; fi; done >> {folder}/calls\n"
        f"echo >> {folder}/calls\n"
        f"echo ${{NVTE_PYTORCH_FORCE_BUILD:-}} >> {folder}/forced\n"
    )
    pip.chmod(0o755)
    # An environment has a command `python`; a system may have python3 alone.
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **settings}
    done = subprocess.run(
        [SCRIPT, RELEASES], env=environment, capture_output=True, text=True, check=False
    )
    calls = folder / "calls"
    return [line.split() for line in calls.read_text().splitlines()] if calls.exists() else [], (
        done.stderr if done.returncode else ""
    )


def names() -> set[str]:
    lines = RELEASES.read_text().splitlines()
    return {line.split("==")[0] for line in lines if not line.startswith("#")}


def test_the_extension_is_compiled_after_torch(tmp_path: Path) -> None:
    (releases, tools, extension), error = install(tmp_path)
    assert not error
    assert names() - set(releases) == {EXTENSION}
    assert "--no-deps" in releases
    assert any(word.startswith("pybind11") for word in tools)
    assert extension[-1] == EXTENSION
    assert "--no-build-isolation" in extension
    assert (tmp_path / "forced").read_text().splitlines()[-1] == "TRUE"


def test_nvidias_image_keeps_its_own_builds(tmp_path: Path) -> None:
    (releases,), error = install(tmp_path, BASE="ngc")
    assert not error
    left_out = names() - set(releases)
    assert {"torch", "triton", "vllm", "transformer-engine", EXTENSION, "numpy"} <= left_out
    assert {"megatron-core", "transformers", "omegaconf"} <= set(releases)
    assert not [name for name in releases if name.startswith(("nvidia-", "cuda-"))]


def test_apex_on_request(tmp_path: Path) -> None:
    calls, error = install(tmp_path, COMPILE="no", APEX_REF="0123abc")
    assert not error
    assert calls[-1][-1] == "git+https://github.com/NVIDIA/apex@0123abc"
    assert len(calls) == 2


def test_another_base_is_refused(tmp_path: Path) -> None:
    calls, error = install(tmp_path, BASE="rocm")
    assert not calls
    assert error == "error: BASE is 'rocm'; it has to be cuda or ngc\n"


@pytest.mark.parametrize("argument", ["CUDA_IMAGE", "NGC_IMAGE", "BASE", "APEX_REF", "MAX_JOBS"])
def test_documented_arguments_exist(argument: str) -> None:
    assert re.search(rf"^ARG {argument}\b", DOCKERFILE, re.MULTILINE)
    assert f"`{argument}" in (ROOT / "docs/installation.md").read_text()
