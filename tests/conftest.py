"""Tiers of tests: `ranks` starts processes, `slow` is left to the nightly run (docs/testing.md)."""

import pytest

# Names by which a test module starts processes.
STARTERS = {"run_ranks", "StartedRanks", "subprocess"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and STARTERS & vars(item.module).keys():
            item.add_marker(pytest.mark.ranks)
