"""Which runs the comparison is made of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from methods import BY_KEY, METHODS, ON_CHAINS, STALE, Method, chosen_lr
from runs import Budget, Run

EARLY, RL = "early", "rl"
PAIRS = {RL: "teacher by RL from the student", EARLY: "student an early checkpoint of the teacher"}
_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
_MAIN = ("oprd", "top1", "top16", "top1_oprd10")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Methods that are compared under the same conditions.

    Attributes:
        pair: `EARLY` or `RL`.
        responses: Responses of a step.
        methods: Keys of the methods.
        seeds: Runs of each method.
        rates: Learning rates of the sweep; where there is none, a method has the rate that the
            plan's first cell chose for it, or that of methods.py.
    """

    pair: str
    responses: int
    methods: Sequence[str]
    seeds: int
    rates: Sequence[float] = ()

    @property
    def key(self) -> str:
        """Its name in JSON."""
        return f"{self.pair}_{self.responses}"

    def sweep(self) -> Iterator[Run]:
        """The runs that choose learning rates."""
        for method in self._methods():
            for lr in self.rates if method.lr_of is None else ():
                yield self._run(method, lr=lr, seed=0)

    def runs(self, chosen: Mapping[str, float]) -> Iterator[Run]:
        """The runs that are reported, seed by seed."""
        for seed in range(1, self.seeds + 1):
            for method in self._methods():
                yield self._run(method, lr=chosen_lr(method, chosen), seed=seed)

    def _methods(self) -> list[Method]:
        return [BY_KEY[key] for key in self.methods]

    def _run(self, method: Method, *, lr: float, seed: int) -> Run:
        return Run(pair=self.pair, method=method.key, responses=self.responses, lr=lr, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole comparison.

    Attributes:
        budget: What every run gets.
        num_sampled: Test problems that are answered by sampling, for cosine and KL.
        cells: In the order in which they run.
        task: Of the models, one of `task.TASKS`.
    """

    budget: Budget
    num_sampled: int
    cells: Sequence[Cell]
    task: str = "sums"


_ALL = tuple(method.key for method in METHODS)
_PAIR = (*_MAIN, "oprd_token", "oprd_last", "full", "ride")
_BUDGET = Budget(steps=200, interval=40, curve_problems=400)

PLANS = {
    "default": Plan(
        budget=_BUDGET,
        num_sampled=400,
        cells=(
            Cell(
                pair=RL,
                responses=16,
                methods=("oprd", "oprd_token", "oprd_last", *_MAIN[1:], "full"),
                seeds=1,
            ),
            Cell(pair=EARLY, responses=16, methods=_MAIN, seeds=1),
        ),
    ),
    "full": Plan(
        budget=_BUDGET,
        num_sampled=400,
        cells=(
            Cell(pair=RL, responses=16, methods=_ALL, seeds=3, rates=_RATES),
            # Each cell chooses its own rates: fewer responses want lower ones.
            Cell(pair=EARLY, responses=16, methods=_PAIR, seeds=3, rates=_RATES[:3]),
            Cell(pair=RL, responses=4, methods=_MAIN, seeds=3, rates=_RATES[:3]),
            Cell(pair=RL, responses=64, methods=_MAIN, seeds=3, rates=_RATES[:3]),
        ),
    ),
    "chains": Plan(
        task="chains",
        budget=Budget(steps=100, interval=25, curve_problems=200),
        num_sampled=200,
        cells=(
            Cell(
                pair=EARLY,
                responses=16,
                methods=("oprd", "top16", *(method.key for method in ON_CHAINS)),
                seeds=1,
                rates=(3e-4, 1e-3),
            ),
        ),
    ),
    "staleness": Plan(
        budget=_BUDGET,
        num_sampled=400,
        cells=(
            Cell(
                pair=RL,
                responses=16,
                methods=("oprd", "top1", *(method.key for method in STALE)),
                seeds=2,
            ),
        ),
    ),
    # For the tests: too short to tell methods apart.
    "small": Plan(
        budget=Budget(steps=4, interval=2, curve_problems=8),
        num_sampled=8,
        cells=(
            # Not RL: so small a student never gets a reward, and its teacher is the student itself.
            Cell(pair=EARLY, responses=8, methods=("oprd",), seeds=1, rates=(1e-4, 1e-3)),
            Cell(pair=RL, responses=8, methods=("oprd_then_top1", "ride"), seeds=1),
        ),
    ),
}
