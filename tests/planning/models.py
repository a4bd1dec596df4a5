"""Folders with nothing but the config.json of a published model."""

import shutil
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
# Runs whose plans the tests know.
EXAMPLES = Path(__file__).parent / "runs"


def model_folder(directory: Path, name: str) -> Path:
    """A folder called ``name`` under ``directory`` with that model's config.json."""
    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(CONFIGS / f"{name}.json", folder / "config.json")
    return folder
