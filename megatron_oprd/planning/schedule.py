"""Peak memory under Megatron's pipeline schedules."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ChunkBytes:
    """Bytes of one model chunk for one micro-batch of the student's pass."""

    saved: int  # from the forward until the backward pass
    recomputed: int  # saved again in the backward pass, at most, in addition to saved
    workspace: int  # temporary, in either pass
    end_workspace: int  # temporary, at the end of the backward pass, when saved is freed
    targets: int  # the teacher's targets that the chunk uses
    # In the backward instead of the forward pass (recomputed layers).
    uses_targets_in_backward: bool


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes that a rank keeps at the moment of highest memory."""

    activations: int = 0  # saved tensors
    workspace: int = 0  # temporary
    targets: int = 0  # not used yet

    @property
    def total(self) -> int:
        """Sum of all bytes."""
        return self.activations + self.workspace + self.targets


def peak_of_student_pass(
    chunks: Sequence[ChunkBytes],
    *,
    targets: int,
    pp_rank: int,
    pp_size: int,
    num_micro_batches: int,
) -> Peak:
    """The highest memory of a rank in the student's pass.

    ``chunks`` has one chunk per virtual stage; ``targets`` are the bytes of all targets at the
    start.
    """
    saved, peak = 0, Peak(targets=targets)

    def see(activations: int, workspace: int) -> None:
        nonlocal peak
        now = Peak(activations=activations, workspace=workspace, targets=targets)
        peak = max(peak, now, key=lambda at: at.total)

    for number, forward in _order(len(chunks), pp_rank, pp_size, num_micro_batches):
        chunk = chunks[number]
        if forward:
            saved += chunk.saved
            see(saved, chunk.workspace)
        else:
            see(saved + chunk.recomputed, chunk.workspace)
            saved -= chunk.saved
            see(saved, chunk.end_workspace)
        # Targets are freed by the pass that uses them.
        if forward != chunk.uses_targets_in_backward:
            targets = max(targets - chunk.targets, 0)
    assert saved == 0
    return peak


def _order(
    num_chunks: int, pp_rank: int, pp_size: int, num_micro_batches: int
) -> Iterator[tuple[int, bool]]:
    """Yields (chunk, is forward) in the order in which a rank processes them.

    This is megatron-core's 1F1B (``get_pp_rank_microbatches`` and ``get_schedule_table`` in
    schedules.py). The interleaved schedule takes ``pp_size`` micro-batches at a time through a
    chunk.
    """
    total = num_micro_batches * num_chunks
    warmup = pp_size - pp_rank - 1
    if num_chunks > 1:
        warmup = 2 * warmup + (num_chunks - 1) * pp_size
    warmup = min(warmup, total)
    forward = [(item // pp_size) % num_chunks for item in range(total)]
    for item in range(warmup):
        yield forward[item], True
    for item in range(total - warmup):
        yield forward[warmup + item], True
        # Backward passes take the chunks in reverse.
        yield num_chunks - 1 - forward[item], False
    for item in range(total - warmup, total):
        yield num_chunks - 1 - forward[item], False
