"""The sequences and positions that projectors are fitted on, and those that are held out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
import xxhash
from torch import Tensor

from megatron_oprd.config.schema import TapConfig
from megatron_oprd.data.batching import TeacherReading
from megatron_oprd.distill.positions import supervise
from megatron_oprd.errors import UserError
from megatron_oprd.rollout.engine import Rollout, teacher_sequences_of


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Sequences with a number for each position."""

    token_ids: list[list[int]]  # prompt and response
    # For each sequence [length], int64: the row of each position, from 1; 0 is an unused position.
    row_numbers: list[Tensor]
    num_rows: int  # used positions
    reading: TeacherReading | None = None  # if the teacher reads other sequences

    def part(self, start: int, stop: int) -> "Sequences":
        """The sequences from ``start`` to ``stop`` (excluded)."""
        reading = self.reading
        if reading is not None:
            reading = replace(
                reading,
                sequences=reading.sequences[start:stop],
                positions=reading.positions[start:stop],
            )
        return replace(
            self,
            token_ids=self.token_ids[start:stop],
            row_numbers=self.row_numbers[start:stop],
            reading=reading,
        )

    def filled_up(self, multiple: int) -> "Sequences":
        """Pads with sequences without rows up to a multiple of ``multiple``."""
        missing = -len(self.token_ids) % multiple
        reading = self.reading
        if reading is not None:
            reading = replace(
                reading,
                sequences=[*reading.sequences, *([reading.sequences[0][:1]] * missing)],
                positions=[*reading.positions, *([torch.tensor([-1])] * missing)],
            )
        return replace(
            self,
            # One token each, to cost little.
            token_ids=[*self.token_ids, *([self.token_ids[0][:1]] * missing)],
            row_numbers=[*self.row_numbers, *([torch.tensor([0])] * missing)],
            reading=reading,
        )


def split_prompts(prompts: Sequence[int], *, share: float, seed: int) -> set[int]:
    """The held-out prompts: the ``share`` with the smallest hashes of prompt and ``seed``.

    At least one prompt is held out, and one is not.

    Raises:
        UserError: There is only one prompt.
    """

    def by_hash(prompt: int) -> str:
        return xxhash.xxh64_hexdigest(f"{seed}:{prompt}".encode())

    different = sorted(set(prompts), key=by_hash)
    if len(different) < 2:
        raise UserError(
            "data.prompts has a single prompt; a bridge needs at least two, one to be fitted on "
            "and one to be measured on"
        )
    return set(different[: min(ceil(share * len(different)), len(different) - 1)])


def number_rows(
    rollouts: Sequence[Rollout], taps: TapConfig, *, max_rows: int | None, seed: int
) -> Sequences:
    """Numbers the supervised positions of at least one rollout.

    ``max_rows`` limits them to a random draw by ``seed``; None takes all.
    """
    teacher_sequences = teacher_sequences_of(rollouts)
    supervision = supervise(
        [len(one.prompt_ids) for one in rollouts],
        [len(one.response_ids) for one in rollouts],
        teacher_sequences,
        positions=taps.positions,
        k=taps.k,
        alignment=taps.alignment,
        aggregation="token_mean",
        written=[one.written for one in rollouts],
    )
    weights = supervision.weights
    lengths = [len(one) for one in weights]
    used = torch.cat(weights).nonzero().squeeze(1)
    if max_rows is not None and len(used) > max_rows:
        draw = torch.randperm(len(used), generator=torch.Generator().manual_seed(seed))
        used = used[draw[:max_rows].sort().values]
    row_numbers = torch.zeros(sum(lengths), dtype=torch.int64)
    row_numbers[used] = torch.arange(1, len(used) + 1)
    of_sequences = list(row_numbers.split(lengths))
    reading = None
    if teacher_sequences is not None:
        assert supervision.positions is not None
        reading = TeacherReading(
            sequences=[[*one.prompt_ids, *one.response_ids] for one in teacher_sequences],
            positions=[
                torch.where(numbers > 0, positions, -1)
                for numbers, positions in zip(of_sequences, supervision.positions, strict=True)
            ],
            output_positions=None,
        )
    return Sequences(
        token_ids=[[*one.prompt_ids, *one.response_ids] for one in rollouts],
        row_numbers=of_sequences,
        num_rows=len(used),
        reading=reading,
    )
