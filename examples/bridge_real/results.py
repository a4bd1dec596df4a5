"""What came out: the file, and the tables."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table
from stages import Budget

_STAGES = ("start", "before", "after")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One student.

    Attributes:
        kind: Its tokenizer: same, byte_level or sentence_piece.
        parameters: Its parameters.
        vocabulary: Its tokens.
        bridge_cosine: Rank -> mean over the layers before and after the fit, on held-out responses.
        loss: Of each step through the bridge.
        cosine: Likewise, the mean over the layers, on the student's own responses.
        control_cosine: The cosine of a student that learns nothing, on the same prompts.
        paired_share: Of each step: share of response positions that are compared; None with one
            tokenizer.
        nats_per_character: Stage -> of the teacher's held-out answers. Stages: start (slimmed),
            before (briefly trained), after (trained through the bridge).
        against_teacher: What `megatron_oprd.evaluate` wrote; None with another tokenizer.
        seconds: For this student.
    """

    kind: str
    parameters: int
    vocabulary: int
    bridge_cosine: dict[str, dict[str, float]]
    loss: list[float]
    cosine: list[float]
    control_cosine: list[float]
    paired_share: list[float | None]
    nats_per_character: dict[str, float]
    against_teacher: dict[str, Any] | None
    seconds: float


def cosines(manifest: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Rank -> the mean cosine over the layers, before and after the fit."""
    return {
        rank: {when: mean(one[when]) for when in ("before", "after")}
        for rank, one in manifest["cosine"].items()
    }


def write_results(
    file: Path, outcomes: Sequence[Outcome], budget: Budget, *, seed: int, teachers: float
) -> None:
    """Writes everything as JSON; ``teachers`` is the teacher's own nats a character."""
    content = {
        "seed": seed,
        "budget": asdict(budget),
        "teacher_nats_per_character": teachers,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    file.write_text(json.dumps(content, indent=2))


def outcome_table(outcomes: Sequence[Outcome], budget: Budget, teachers: float) -> Table:
    """One column a student: the bridge, training through it, and the measures of its stages."""
    table = Table(title="Students and their bridges")
    table.add_column("")
    for outcome in outcomes:
        table.add_column(outcome.kind, justify="right")

    def row(name: str, values: Sequence[str]) -> None:
        table.add_row(name, *values)

    row("parameters", [f"{one.parameters:,}" for one in outcomes])
    row("vocabulary", [f"{one.vocabulary:,}" for one in outcomes])
    for rank in budget.ranks:
        of_rank = [one.bridge_cosine[str(rank)] for one in outcomes]
        shown = [f"{one['before']:.3f} -> {one['after']:.3f}" for one in of_rank]
        row(f"bridge's cosine, r = {rank}", shown)
    half = budget.steps // 2
    for name in ("loss", "cosine", "control_cosine", "paired_share"):
        shown = []
        for one in outcomes:
            values = getattr(one, name)
            if None in values:
                shown.append("-")
            else:
                shown.append(f"{mean(values[:half]):.4f} -> {mean(values[half:]):.4f}")
        row(f"{name}, first and second half of the steps", shown)
    for stage in _STAGES:
        shown = [f"{one.nats_per_character[stage]:.3f}" for one in outcomes]
        row(f"nats a character, {stage} (teacher {teachers:.3f})", shown)
    row("seconds", [f"{one.seconds:.0f}" for one in outcomes])
    return table
