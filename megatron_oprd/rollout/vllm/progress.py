"""How far an engine's process is with its responses, in memory that it shares with its owner."""

import mmap
import os
from typing import Self

from megatron_oprd.rollout.engine import Progress

_NUMBERS, _BYTES = 2, 8


class SharedProgress:
    """The `Progress` that one process writes and another reads, at any time.

    Each number is read whole; the two may be of different moments.
    """

    def __init__(self, descriptor: int) -> None:
        """Maps the memory of a file descriptor, and closes it."""
        memory = mmap.mmap(descriptor, _NUMBERS * _BYTES)
        os.close(descriptor)
        # Not closed: a thread may still read it. It goes with the last reference.
        self._numbers = memoryview(memory).cast("q")

    @classmethod
    def create(cls) -> tuple[Self, int]:
        """New memory with zeros, and a descriptor of it for the other process."""
        descriptor = os.memfd_create("oprd-progress")
        os.ftruncate(descriptor, _NUMBERS * _BYTES)
        return cls(os.dup(descriptor)), descriptor

    def set(self, progress: Progress) -> None:
        """Writes the numbers."""
        self._numbers[0], self._numbers[1] = progress.responses, progress.tokens

    def get(self) -> Progress:
        """Reads them."""
        return Progress(responses=self._numbers[0], tokens=self._numbers[1])
