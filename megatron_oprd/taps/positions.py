"""Which response positions are supervised."""

from typing import get_args

from torch import Tensor

from megatron_oprd.config_losses import Positions


def position_mask(response_mask: Tensor, positions: Positions, k: int | None) -> Tensor:
    """The supervised ones among the valid response tokens.

    Tokens are counted, not columns: padding on either side and holes in the mask do not count. A
    response of fewer than k tokens gives all of them, an empty one none.

    Args:
        response_mask: [B, T], 1 at valid response tokens and 0 elsewhere; any dtype.
        positions: ``all``; ``last`` (the last valid token); ``last_k`` or ``first_k``.
        k: How many tokens of each response, at least 1; read for ``last_k`` and ``first_k`` only,
            and None is allowed for the others only.

    Returns:
        [B, T], 1 at the supervised tokens, in ``response_mask``'s dtype.

    Raises:
        ValueError: Unknown ``positions``, or ``last_k`` or ``first_k`` without a k of 1 or more.
    """
    if positions not in get_args(Positions):
        allowed = ", ".join(get_args(Positions))
        raise ValueError(f"positions is {positions!r}; it must be one of: {allowed}")
    if positions == "all":
        return response_mask.clone()
    if positions == "last":
        k = 1
    elif k is None or k < 1:
        raise ValueError(f"positions is {positions!r} and k is {k}; k must be 1 or more")

    valid = response_mask != 0  # [B, T]
    from_start = valid.long().cumsum(dim=1)  # [B, T]; 1 at the first valid token
    if positions == "first_k":
        chosen = valid & (from_start <= k)
    else:
        chosen = valid & (from_start > from_start[:, -1:] - k)
    return chosen.to(response_mask.dtype)
