"""Which of several teachers teaches a prompt."""

import hashlib
from collections.abc import Sequence

from megatron_oprd.rollout.engine import Rollout


def taught_by(
    rollouts: Sequence[Rollout], shares: Sequence[float | None], *, seed: int
) -> list[list[bool]] | None:
    """For each teacher, whether it teaches each rollout.

    A prompt belongs to a teacher by a hash of its number in the data set, in every step alike.

    Args:
        rollouts: The step's.
        shares: The share of the prompts that each teacher teaches; None is all of them, beside the
            one whose share a prompt is in.
        seed: Enters the hash.

    Returns:
        [teachers][rollouts]; None if all teach everything.
    """
    if all(share is None for share in shares):
        return None
    numbers = [_number(rollout.prompt_index, seed) for rollout in rollouts]
    result, start = [], 0.0
    for share in shares:
        if share is None:
            result.append([True] * len(rollouts))
            continue
        stop = start + share
        # The last share ends at 1, whatever rounding made of the sum.
        end = 1.0 if stop > 1 - 1e-9 else stop
        result.append([start <= number < end for number in numbers])
        start = stop
    return result


def _number(prompt_index: int, seed: int) -> float:
    """A number in [0, 1), the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{prompt_index}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
