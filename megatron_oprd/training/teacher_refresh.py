"""A teacher that follows the student that it is a copy of (on-policy self-distillation)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_oprd.weights.megatron_keys import named_parameters

PREFIX = "teacher."


class TeacherRefresh:
    """Copies or averages the student's weights into the teacher.

    Teacher and student have the same layers on each rank, so nothing is communicated.

    Args:
        teacher: The teacher's chunks on this rank; they may end earlier than the student's.
        student: The student's chunks, not wrapped.
        interval: Updates from one refresh to the next.
        ema_decay: The weight of the teacher's old value; 0 copies the student.
    """

    def __init__(
        self,
        teacher: Sequence[GPTModel],
        student: Sequence[GPTModel],
        *,
        interval: int,
        ema_decay: float,
    ) -> None:
        of_student = named_parameters(student)
        self._pairs = [
            (parameter, of_student[name]) for name, parameter in named_parameters(teacher).items()
        ]
        self._chunks = teacher
        self._interval = interval
        self._decay = ema_decay
        # In fp32 next to bf16 weights: a small share of a difference would be rounded away in bf16.
        self._averages: dict[int, Tensor] = {}
        if ema_decay > 0:
            self._averages = {
                id(parameter): parameter.data.float()  # the parameter itself if it is fp32
                for parameter, _ in self._pairs
            }

    @torch.no_grad()
    def after_update(self, num_updates: int) -> None:
        """Refreshes the teacher if it is due after ``num_updates`` steps, this one included."""
        if num_updates % self._interval:
            return
        for of_teacher, of_student in self._pairs:
            average = self._averages.get(id(of_teacher))
            if average is None:
                of_teacher.copy_(of_student)
            else:
                average.lerp_(of_student.to(average.dtype), 1 - self._decay)
                of_teacher.copy_(average)

    def sharded_state_dict(self, **options: Any) -> dict[str, Any]:
        """The teacher's state for Megatron's checkpoints: the averages, or the weights."""
        state: dict[str, Any] = {}
        for number, (name, parameter, sharded) in enumerate(self._sharded(options)):
            average = self._averages.get(id(parameter))
            if average is not None:
                sharded.data = average
                if isinstance(sharded, ShardedTensor):
                    sharded.dtype = average.dtype
            # Numbered, because parameters of different chunks may have the same name.
            state[f"{number}.{name}"] = sharded
        return state

    @torch.no_grad()
    def load(self, loaded: dict[str, Tensor]) -> None:
        """Sets the teacher from a loaded `sharded_state_dict`."""
        for number, (name, parameter) in enumerate(self._named()):
            value = loaded[f"{number}.{name}"]
            if id(parameter) in self._averages:
                self._averages[id(parameter)].copy_(value)
            parameter.copy_(value)

    def _named(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        return (named for chunk in self._chunks for named in chunk.named_parameters())

    def _sharded(self, options: dict[str, Any]) -> Iterator[tuple[str, torch.nn.Parameter, Any]]:
        for chunk in self._chunks:
            state = chunk.sharded_state_dict(prefix=PREFIX, **options)
            for name, parameter in chunk.named_parameters():
                yield name, parameter, state[PREFIX + name]
