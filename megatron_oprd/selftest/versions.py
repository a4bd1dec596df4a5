"""Whether the installed packages are those that this package is tested with."""

from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement

from megatron_oprd.selftest.cases import CaseFailedError, Place

# Shown beside the packages of the extras for users.
_SHOWN = ("torch", "megatron-core", "transformers")


def run(arguments: dict[str, Any], place: Place) -> str:
    """Compares versions with the ranges in this package's metadata, those of its extras too.

    A package of an extra may be missing.

    Raises:
        CaseFailedError: A package is outside its range.
    """
    extras = metadata.metadata("megatron-oprd").get_all("Provides-Extra") or []
    requirements = [
        requirement
        for requirement in map(Requirement, metadata.requires("megatron-oprd") or [])
        # What is installed has to fit, whichever extra it came with.
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in ["", *extras])
    ]
    wrong = []
    for requirement in requirements:
        found = _version(requirement.name)
        if found and not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    if wrong:
        raise CaseFailedError("; ".join(wrong))
    of_extras = [
        requirement.name
        for requirement in requirements
        if "extra ==" in str(requirement.marker) and "dev" not in str(requirement.marker)
    ]
    names = dict.fromkeys([*_SHOWN, *of_extras])
    versions = [f"{name} {found}" for name in names if (found := _version(name))]
    return ", ".join([*versions, *_of_gpus()])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _of_gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["no GPU"]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [
        f"CUDA {torch.version.cuda}",
        f"NCCL {nccl}",
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} a machine",
    ]
