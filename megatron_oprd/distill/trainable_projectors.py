"""Projectors that train with the student: they map its states to the teacher's width.

There is one for each tapped layer, a submodule of the student's chunk that has the layer. So
Megatron's data parallelism, optimizer and checkpoints treat its parameters as they treat the
student's. It is no part of the student: weight sync and export leave it out.
"""

import math
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from typing_extensions import override

from megatron_oprd.config.schema import BridgeConfig
from megatron_oprd.weights.megatron_keys import PROJECTORS

# Odd and above any number of layers, so that no two pairs of seed and layer share a generator.
_LAYER_SEEDS = 1_000_003


class _Linear(torch.nn.Linear):
    """A linear layer that computes in its input's dtype, whatever its parameters' dtype is."""

    @override
    def reset_parameters(self) -> None:
        # torch would draw from the global random state, which depends on the layout.
        pass

    @override
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class Projector(torch.nn.Sequential):
    """Maps states [n, d_S] of any floating dtype to [n, d_T], in fp32 at least.

    ``linear`` is one linear layer, ``mlp`` two with a GELU between them. Biases start at 0. A
    linear layer of equal widths starts as the identity, so that a run begins with the loss of
    states that are compared directly. Every other matrix starts normal with variance 1 / its input
    width, which keeps the mean square of its input.

    Args:
        settings: The kind and the inner width.
        student_width: d_S.
        teacher_width: d_T.
        seed: The run's. Equal seeds and layers give equal projectors in every layout.
        layer: The student layer, from 0.
    """

    def __init__(
        self,
        settings: BridgeConfig,
        *,
        student_width: int,
        teacher_width: int,
        seed: int,
        layer: int,
    ) -> None:
        if settings.trainable == "linear":
            super().__init__(_Linear(student_width, teacher_width))
        else:
            hidden = settings.hidden_size or teacher_width
            super().__init__(
                _Linear(student_width, hidden), torch.nn.GELU(), _Linear(hidden, teacher_width)
            )
        generator = torch.Generator().manual_seed(seed * _LAYER_SEEDS + layer)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                elif len(self) == 1 and student_width == teacher_width:
                    torch.nn.init.eye_(parameter)
                else:
                    deviation = 1 / math.sqrt(parameter.shape[1])
                    parameter.normal_(0, deviation, generator=generator)

    @override
    def forward(self, input: Tensor) -> Tensor:
        # bf16 has 8 significant bits, too few for a difference of states.
        return super().forward(input.to(torch.promote_types(input.dtype, torch.float32)))


def add_projectors(
    chunks: Sequence[GPTModel],
    layers: Collection[int],
    settings: BridgeConfig,
    *,
    student_width: int,
    teacher_width: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    sequence_parallel: bool,
) -> dict[int, Projector]:
    """Adds a projector to the student's chunks for each of ``layers`` that they have.

    Call it before the chunks are wrapped for data parallelism. Every tensor-parallel rank has the
    whole projector.

    Args:
        chunks: The student's on this rank, not wrapped.
        layers: The tapped student layers, from 0, of the whole model.
        settings: See `Projector`, as for the widths and the seed.
        student_width: d_S.
        teacher_width: d_T.
        seed: The run's.
        dtype: Of the parameters; the student's.
        device: The student's.
        sequence_parallel: Whether the tensor-parallel ranks have different rows.

    Returns:
        This rank's projectors, by student layer.
    """
    added: dict[int, Projector] = {}
    for chunk in chunks:
        here = [layer.layer_number - 1 for layer in chunk.decoder.layers]  # Megatron counts from 1
        own = {
            layer: Projector(
                settings,
                student_width=student_width,
                teacher_width=teacher_width,
                seed=seed,
                layer=layer,
            ).to(device=device, dtype=dtype)
            for layer in here
            if layer in layers
        }
        if own:
            modules = torch.nn.ModuleDict({str(layer): one for layer, one in own.items()})
            setattr(chunk, PROJECTORS, modules)
        added |= own
    for one in added.values():
        for parameter in one.parameters():
            # With this mark Megatron sums the gradient over the tensor-parallel ranks. Without
            # sequence parallelism all of them have the whole gradient.
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
    return added


def num_parameters(settings: BridgeConfig, *, student_width: int, teacher_width: int) -> int:
    """Numbers in one projector."""
    if settings.trainable == "linear":
        return (student_width + 1) * teacher_width
    hidden = settings.hidden_size or teacher_width
    return (student_width + 1) * hidden + (hidden + 1) * teacher_width
