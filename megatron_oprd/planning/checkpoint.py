"""The size of a training checkpoint."""

import math

from megatron_oprd.distill.trainable_projectors import num_parameters
from megatron_oprd.models.build import DTYPES
from megatron_oprd.planning.parameters import trains
from megatron_oprd.training.layout import RunLayout

_FP32 = 4


def checkpoint_bytes(layout: RunLayout) -> int:
    """Bytes of student and optimizer in a checkpoint, which every layout writes once.

    That is each parameter in its own format, and of those that train Adam's two moments and, unless
    they are fp32 themselves, the main parameter, all in fp32. Files that do not grow with the model
    are not counted.
    """
    itemsize = DTYPES[layout.config.model.params_dtype].itemsize
    of_states = 2 * _FP32 + (_FP32 if itemsize != _FP32 else 0)
    size = 0
    for mapping in layout.student.table:
        number = math.prod(mapping.local_shape(1))
        size += number * (itemsize + of_states * trains(mapping.megatron, layout))
    if layout.trains_projectors:
        of_one = num_parameters(
            layout.config.bridge,
            student_width=layout.student.architecture.hidden_size,
            teacher_width=layout.teacher.architecture.hidden_size,
        )
        size += len(layout.pairs) * of_one * (itemsize + of_states)
    return size
