"""An alarm for a loss that is met without the task: the score falls while the cosine rises.

Hidden states can come closer to the teacher's while the student's answers get worse. The loss and
the cosine show nothing of it; an evaluation during the run does.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatron_oprd.errors import say

_STANDARD_ERRORS = 2.0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the alarm reads of a step with an evaluation."""

    num_steps: int  # done before the evaluation
    score: float  # share of right responses, over all benchmarks
    num_responses: int  # problems x n, over all benchmarks
    benchmarks: frozenset[str]
    cosine: float | None  # of the step before the evaluation, mean over layers

    @classmethod
    def of(cls, metrics: dict[str, Any]) -> Self | None:
        """Reads a step's metrics; None for a step without an evaluation."""
        if metrics.get("eval_score") is None:
            return None
        return cls(
            num_steps=metrics["step"] + 1,
            score=metrics["eval_score"],
            num_responses=metrics["eval_responses"],
            benchmarks=frozenset(name for name in metrics if name.startswith("eval/")),
            cosine=metrics["cosine"],
        )

    def is_comparable(self, other: "Evaluation") -> bool:
        """Whether both are of the same benchmarks with as many responses."""
        return (self.benchmarks, self.num_responses) == (other.benchmarks, other.num_responses)


def standard_error(first: Evaluation, second: Evaluation) -> float:
    """The standard error of the difference of two scores with equal true shares.

    Responses count as independent. Both evaluations have the same problems, whose difficulty is no
    part of the difference, so this is rather too large than too small.
    """
    share = (first.score + second.score) / 2
    return math.sqrt(2 * share * (1 - share) / first.num_responses)


def collapse(best: Evaluation, now: Evaluation) -> str | None:
    """The warning if the score has fallen since its best while the cosine has risen, or None."""
    if best.cosine is None or now.cosine is None or now.cosine <= best.cosine:
        return None
    error = standard_error(best, now)
    fallen = best.score - now.score
    if not fallen > _STANDARD_ERRORS * error:
        return None
    return (
        f"after step {now.num_steps} the evaluation's mean score is {now.score:.4g}, after step "
        f"{best.num_steps} it was {best.score:.4g} ({fallen / error:.1f} standard errors more), "
        f"while the mean cosine rose from {best.cosine:.4g} to {now.cosine:.4g}: the student meets "
        "the loss on hidden states and loses the task. Use fewer layers (taps.layers = last), a "
        "loss on distributions (output_loss.kind), or a crossfade to one "
        "(loss.coefficient_points); see docs/choosing.md"
    )


class CollapseAlarm:
    """Compares each evaluation of a run with its best one so far.

    Args:
        metrics_file: The run's ``metrics.jsonl``, for the evaluations before a resumed run's first
            step.
    """

    def __init__(self, metrics_file: Path) -> None:
        self._best: Evaluation | None = None
        # Missing where another process logs, or nothing has been logged.
        lines = metrics_file.read_text().splitlines() if metrics_file.exists() else []
        for line in lines:
            if (found := Evaluation.of(json.loads(line))) is not None:
                self._remember(found)

    def raise_for(self, metrics: dict[str, Any]) -> bool:
        """Compares a step's evaluation, prints a warning if there is cause, and says whether.

        Call it once for each step with an evaluation.
        """
        now, best = Evaluation.of(metrics), self._best
        assert now is not None
        self._remember(now)
        if best is None or not best.is_comparable(now):
            return False
        warning = collapse(best, now)
        if warning is not None:
            say(f"warning: {warning}")
        return warning is not None

    def _remember(self, now: Evaluation) -> None:
        best = self._best
        # A resumed run may have other benchmarks. Of equal scores the later one counts.
        if best is None or not best.is_comparable(now) or now.score >= best.score:
            self._best = now
