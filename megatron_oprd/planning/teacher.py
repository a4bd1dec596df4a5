"""The frozen teacher's weights in memory."""

import math
from dataclasses import dataclass

from megatron_oprd.models.teacher import layers_in_fp8, uses_engine
from megatron_oprd.planning.layers import has_output_loss, layer_of
from megatron_oprd.planning.parameters import held_parameters, place_of
from megatron_oprd.training.layout import RunLayout

_FP32 = _INT32 = 4
# fp32 tensors that decoding a run of a weight's rows needs at once
_DECODING = 3 * 2**22 * _FP32


@dataclass(frozen=True, kw_only=True)
class TeacherBytes:
    """The teacher's weights on one rank.

    Attributes:
        weights: All of them, scales included.
        head: Of these the LM head that an output-space loss uses, which stays on the device.
        decoding: What one weight takes while a layer that decodes it runs.
    """

    weights: int
    head: int
    decoding: int


def teacher_bytes(layout: RunLayout, *, pp_rank: int, itemsize: int) -> TeacherBytes:
    """The teacher's weights on pipeline rank ``pp_rank``.

    Args:
        layout: The run.
        pp_rank: The rank.
        itemsize: Bytes of a weight that is not in FP8.
    """
    teacher, place = layout.config.teacher, place_of(layout.teacher.parallel)
    in_fp8 = layers_in_fp8(teacher, sum(layout.teacher.extent.layers_per_stage))
    weights = largest = 0
    for mapping in held_parameters(layout, layout.teacher, pp_rank):
        shape = mapping.local_shape(mapping.split_at(place)[1])
        is_linear = len(shape) == 2 and not mapping.is_replicated
        if is_linear and layer_of(mapping.megatron) in in_fp8:
            weights += _fp8_bytes(*shape, recipe=teacher.fp8_recipe)
            largest = max(largest, math.prod(shape))
        else:
            weights += math.prod(shape) * itemsize
    a = layout.teacher.architecture
    if a.tied and pp_rank > 0 and has_output_loss(layout, pp_rank):
        weights += layout.teacher.padded_vocab_size // place.tp_size * a.hidden_size * itemsize
    decodes = largest and not uses_engine(teacher)
    head = 0
    if has_output_loss(layout, pp_rank):
        head = layout.teacher.padded_vocab_size // place.tp_size * a.hidden_size * itemsize
    return TeacherBytes(
        weights=weights,
        head=head,
        decoding=largest * itemsize + _DECODING if decodes else 0,
    )


def average_bytes(layout: RunLayout, *, pp_rank: int, itemsize: int) -> int:
    """The fp32 averages of a teacher that follows the student (``teacher.ema_decay``).

    Where the weights are fp32 they are the averages.

    Args:
        layout: The run.
        pp_rank: The rank.
        itemsize: Bytes of a weight.
    """
    if not layout.config.teacher.ema_decay or itemsize == _FP32:
        return 0
    return teacher_bytes(layout, pp_rank=pp_rank, itemsize=itemsize).weights // itemsize * _FP32


def _fp8_bytes(rows: int, columns: int, *, recipe: str) -> int:
    """A weight with its scales."""
    blocks = -(-rows // 128) * -(-columns // 128)
    scales = {
        "per_channel_log": rows * _FP32,
        "per_channel": rows * _FP32,
        # Each row and each column also has the number of its block.
        "block_128": blocks * _FP32 + (rows + columns) * _INT32,
        "tensorwise": _FP32,
        "blockwise": blocks * _FP32,
        "mxfp8": rows * columns // 32,
    }
    return rows * columns + scales[recipe]
