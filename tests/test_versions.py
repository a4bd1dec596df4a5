"""Releases that belong together: the constraints files against pyproject.toml."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.ranks import ROOT

CONSTRAINTS = ROOT / "constraints"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# File: extras that it is for, and versions of Python.
FILES = {
    "cpu.txt": (["dev"], ["3.11", "3.12", "3.13"]),
    "gpu.txt": (["te", "vllm"], ["3.12"]),
    "gpu-test.txt": (["te", "vllm", "dev"], ["3.12"]),
}
CASES = [(name, python) for name, (_, pythons) in FILES.items() for python in pythons]


def environment(python: str) -> dict[str, str]:
    return {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
    }


def wanted(extras: list[str], python: str) -> Iterator[Requirement]:
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            yield requirement


def pins(file: Path, python: str) -> dict[str, str]:
    """Names and versions of ``file`` that hold for this Python."""
    found: dict[str, str] = {}
    for line in file.read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            assert requirement.name not in found, f"{requirement.name} is pinned twice"
            found[requirement.name] = specifier.version
    return found


@pytest.mark.parametrize(("name", "python"), CASES)
def test_every_requirement_has_a_release_in_its_range(name: str, python: str) -> None:
    pinned = pins(CONSTRAINTS / name, python)
    for requirement in wanted(FILES[name][0], python):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{name} lacks {requirement.name}"
        assert requirement.specifier.contains(version), f"{name}: {requirement} is {version}"


def test_the_test_stage_has_the_releases_of_the_image() -> None:
    image, test = (pins(CONSTRAINTS / name, "3.12") for name in ("gpu.txt", "gpu-test.txt"))
    assert image.items() <= test.items()


@pytest.mark.parametrize("name", FILES)
def test_no_place_to_fetch_from_is_named(name: str) -> None:
    """Such a line would override the user's own package index."""
    text = (CONSTRAINTS / name).read_text()
    assert not re.search(r"://|^-|@", text, re.MULTILINE)


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_one_release_series_of_megatron_core_for_each_transformer_engine(python: str) -> None:
    """Each Python's extra names both, so that neither can move alone."""
    names = [requirement.name for requirement in wanted(["te"], python)]
    assert names.count("transformer-engine") == 1
    assert names.count("megatron-core") == 2  # of the package, and the extra's closer one


def test_cuda_python_goes_with_torchs_bindings() -> None:
    pinned = pins(CONSTRAINTS / "gpu.txt", "3.12")
    assert pinned["cuda-python"].split(".")[0] == pinned["cuda-bindings"].split(".")[0] == "13"
