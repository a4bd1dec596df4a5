"""What a run leaves in its folder about itself: its settings, versions and hardware."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

import megatron_oprd
from megatron_oprd.config.load import dump_config
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.weights.disk import write_json


def write_record(plan: RunPlan, *, world_size: int) -> None:
    """Writes ``config.yaml`` and ``environment.json``, of the newest start of the run."""
    folder = Path(plan.config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(plan.config), encoding="utf-8")
    write_json(folder / "environment.json", environment(world_size=world_size))


def environment(*, world_size: int) -> dict[str, Any]:
    """Versions, the commit of this package's sources, and the hardware of this machine."""
    return {
        "megatron_oprd": megatron_oprd.__version__,
        "git": _git(Path(megatron_oprd.__file__).parents[1]),
        "python": platform.python_version(),
        "packages": _packages(),
        "hardware": {
            "host": platform.node(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "gpus": [
                torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())
            ],
            "world_size": world_size,
        },
        "cuda": torch.version.cuda,
        "nccl": (
            ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
        ),
    }


def _packages() -> dict[str, str]:
    """Installed versions of what this package asks for, extras included."""
    names = {Requirement(text).name for text in metadata.requires("megatron-oprd") or []}
    versions = {}
    for name in sorted(names):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # of an extra that is not installed
            continue
    return versions


def _git(sources: Path) -> dict[str, Any] | None:
    """The commit of a checkout, and whether files differ from it; None for an installed package."""
    # Not of a repository further up, in which the package is only installed.
    if not (sources / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str | None:
        done = subprocess.run(
            ["git", "-C", str(sources), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    # git refuses a checkout of another user, as in a container.
    if (commit := git("rev-parse", "HEAD")) is None:
        return None
    return {"commit": commit, "is_changed": bool(git("status", "--porcelain"))}
