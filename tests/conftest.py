"""Tiers of tests: `ranks` starts processes, `slow` is left to the nightly run (docs/testing.md)."""

import gc

import pytest

# Names by which a test module starts processes.
STARTERS = {"run_ranks", "StartedRanks", "subprocess", "Grader", "EngineProcess"}

# Imports leave millions of objects that live as long as pytest. Python's garbage collector would
# visit them all again and again: a third of the time in which pytest collects tests, and half a
# second now and then while a test runs.
gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and STARTERS & vars(item.module).keys():
            item.add_marker(pytest.mark.ranks)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()
