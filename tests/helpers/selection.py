"""Cases of a module that only the nightly run has: marked, and not run for the other tests."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(names: Iterable[str], *, nightly: Collection[str]) -> list[Any]:
    """The names as parameters; those in ``nightly`` have the marker ``slow``."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (name in nightly), id=name) for name in names
    ]


def selected(request: pytest.FixtureRequest) -> set[str]:
    """All strings among the parameters of the module's tests that this run selected."""
    return {
        value
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
        for value in (item.callspec.params.values() if hasattr(item, "callspec") else ())
        if isinstance(value, str)
    }
