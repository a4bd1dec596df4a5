"""The order of layouts that fit: by the time of a step, by simplicity, by memory left.

Of two layouts the simpler one comes first, unless the other is faster by more than 2% of a step for
each setting that only trades time for memory (`_ONLY_FOR_MEMORY`): the estimates are no finer. For
the same reason, a layout that leaves a tenth of the GPU free comes before one that does not, is no
simpler, and is faster by less than 2%.
"""

from dataclasses import dataclass
from operator import attrgetter

from megatron_oprd.planning.changes import Change
from megatron_oprd.planning.estimate import MemoryEstimate
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.time import StepSeconds

# Settings that a run is simpler without, with the values that switch them off. A step counts so
# many times longer for each that is on.
_ONLY_FOR_MEMORY = {
    "recompute.recompute_granularity": None,
    "teacher.offload": "none",
    "optimizer.offload_states": False,
}
LEAST_GAIN = 1.02
# With rollouts beside training many steps are as long as the rollouts. Then the layout that has
# less to do beside them comes first, since it slows them less.
_SHARE_OF_HIDDEN = 0.02
# Of a GPU's memory. The estimate is right to about 10% (docs/benchmarks.md): below this a layout
# has room for that, and still more room is worth no time.
_HAS_ROOM = 0.9


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with one choice of the other settings with which it fits."""

    change: Change  # what differs from the configuration that was given
    memory: MemoryEstimate
    seconds: StepSeconds

    @property
    def num_savers(self) -> int:
        """Settings that are on and that the run is simpler without."""
        config = self.memory.layout.config
        return num_on(Change(tuple((name, attrgetter(name)(config)) for name in _ONLY_FOR_MEMORY)))

    @property
    def rank_seconds(self) -> float:
        """The time of a step, longer for each setting that the run is simpler without."""
        return counted(self.seconds.total, self.seconds.hidden, self.num_savers)

    @property
    def peak_bytes(self) -> int:
        """Memory of the fullest rank."""
        return self.memory.fullest.peak_bytes


def ranked(
    found: dict[Change, list[Candidate]], hardware: Hardware, number: int
) -> list[Candidate]:
    """The first candidate of all sizes, then the first of the other sizes, and so on.

    ``found`` is by sizes, without empty lists.
    """
    left = list(found.values())
    chosen: list[Candidate] = []
    while left and len(chosen) < number:
        first = _first([one for group in left for one in group], hardware)
        chosen.append(first)
        left = [group for group in left if all(one is not first for one in group)]
    return chosen


def _first(candidates: list[Candidate], hardware: Hardware) -> Candidate:
    """The first that has room, or else the one with most of it, of those like the fastest.

    These are about as fast and at least as simple.
    """
    fastest = min(candidates, key=lambda one: (one.rank_seconds, one.num_savers))
    near = [
        one
        for one in candidates
        if one.num_savers <= fastest.num_savers
        and one.rank_seconds < LEAST_GAIN * fastest.rank_seconds
    ]
    most = max(min(one.peak_bytes for one in near), _roomy_bytes(hardware))
    return min((one for one in near if one.peak_bytes <= most), key=_order)


def _order(one: Candidate) -> tuple[float, int]:
    return one.rank_seconds, one.peak_bytes


def _roomy_bytes(hardware: Hardware) -> float:
    return _HAS_ROOM * hardware.memory_gb * 1e9


def always_first(one: Candidate, other: Candidate, hardware: Hardware) -> bool:
    """Whether ``one`` comes before ``other``, whatever else there is."""
    has_room = one.peak_bytes <= max(other.peak_bytes, _roomy_bytes(hardware))
    return has_room and one.num_savers <= other.num_savers and _order(one) <= _order(other)


def bound_of_others(one: Candidate, hardware: Hardware) -> float:
    """`Candidate.rank_seconds` from which on no other one comes before this one."""
    # Nothing is simpler than one without such settings.
    is_safe = one.num_savers == 0 and one.peak_bytes <= _roomy_bytes(hardware)
    return one.rank_seconds * (1 if is_safe else LEAST_GAIN)


def counted(seconds: float, hidden: float, num_savers: int) -> float:
    """What a step counts, of which ``hidden`` seconds go on beside a longer phase."""
    return (seconds + _SHARE_OF_HIDDEN * hidden) * LEAST_GAIN**num_savers


def num_on(*changes: Change) -> int:
    """How many settings of `_ONLY_FOR_MEMORY` the changes switch on."""
    return sum(
        name in _ONLY_FOR_MEMORY and value != _ONLY_FOR_MEMORY[name]
        for change in changes
        for name, value in change.settings
    )


def off_policy(updates: int) -> str:
    """How the age of rollouts is called, ``rollout.max_staleness`` being so many updates."""
    return f"off-policy by {updates} update{'s' if updates > 1 else ''}"
