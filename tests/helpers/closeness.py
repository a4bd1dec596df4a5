"""Values compared relative to their size, so that no test depends on a processor's kernels."""

from typing import Any

import torch


def assert_close_relative(
    found: Any, expected: Any, tolerance: float, *, size: float | None = None, what: object = ""
) -> None:
    """Checks max |found - expected| <= tolerance * max |expected|.

    Expected zeros have to be zeros; a NaN is close to nothing.

    Args:
        found: A tensor, a number, or numbers.
        expected: The same of what is right.
        tolerance: Relative.
        size: What it is relative to, for values whose own size is none: 1.0 for cosines.
        what: For the message.
    """
    found, expected = (
        torch.as_tensor(one).detach().to("cpu", torch.float64) for one in (found, expected)
    )
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    if not expected.numel():
        return
    largest = float(expected.abs().max()) if size is None else size
    difference = float((found - expected).abs().max())
    assert difference <= tolerance * largest, f"{what}: {difference:.3g} of {largest:.3g}"
