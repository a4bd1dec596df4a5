"""Hidden states of every layer and logits of a model, and their differences between two models.

transformers' own model is one source of them and independent of this package; `megatron_states` is
the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from megatron_oprd.errors import UserError
from megatron_oprd.weights.compare import absolute_difference


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """A model's states for some sequences, on the CPU and without padding."""

    layers: list[list[Tensor]]  # raw output by layer and sequence, [length, h]
    normed: list[Tensor]  # final norm's output by sequence, [length, h]
    logits: list[Tensor]  # by sequence, [length, vocabulary]

    def by_place(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Yields (name, tensor per sequence) in the order of the forward pass."""
        yield from ((f"layer {layer}", states) for layer, states in enumerate(self.layers))
        yield "final norm", self.normed
        yield "logits", self.logits


@dataclass(frozen=True, kw_only=True)
class StateDifference:
    """The difference of two models in one place, at the position where it is largest."""

    place: str  # "layer 0", ..., "final norm" or "logits"
    # Largest absolute difference at the position, divided by the largest magnitude there if above
    # 1. Some hidden states reach thousands, which a dtype resolves only so far.
    relative: float
    absolute: float  # largest over all positions
    sequence: int  # index of the sequence
    position: int  # in the sequence
    channel: int  # or token of the vocabulary, with the largest difference
    a: float  # the first model's value
    b: float  # the second model's value


@torch.no_grad()
def transformers_states(
    folder: Path, sequences: Sequence[Sequence[int]], *, device: torch.device
) -> HiddenStates:
    """Runs a folder's model with transformers, in fp32, one sequence of token ids at a time.

    Raises `UserError` if transformers cannot load the model or would initialise some weights.
    """
    model = _load(folder).to(device)
    decoder = model.get_decoder()
    layers: list[list[Tensor]] = [[] for _ in decoder.layers]
    normed: list[Tensor] = []

    def keep(outputs: list[Tensor]) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output  # [1, s, h]
            outputs.append(states[0].cpu())

        return hook

    for layer, outputs in zip(decoder.layers, layers, strict=True):
        layer.register_forward_hook(keep(outputs))
    decoder.norm.register_forward_hook(keep(normed))
    logits = [
        model(torch.tensor([sequence], device=device), use_cache=False).logits[0].cpu()
        for sequence in sequences
    ]
    return HiddenStates(layers=layers, normed=normed, logits=logits)


def _load(folder: Path) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        # A model with parts beside its decoder is in another table.
        nested = config.get_text_config() is not config
        model, info = (
            AutoModelForImageTextToText if nested else AutoModelForCausalLM
        ).from_pretrained(
            folder,
            dtype=torch.float32,
            # Plain attention, without fused kernels.
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers' checks raise exceptions of many types
        raise UserError(
            f"{folder}: transformers cannot load it: {' '.join(str(error).split())}"
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[problem])):
            raise UserError(
                f"{folder}: its tensors are not those of transformers' {type(model).__name__}; "
                f"{problem.replace('_', ' ')}: {', '.join(names[:5])} ({len(names)} in all)"
            )
    if not all(hasattr(model.get_decoder(), part) for part in ("layers", "norm")):
        raise UserError(
            f"{folder}: {type(model).__name__} has no plain stack of layers with a norm behind "
            "it, so its hidden states cannot be compared layer by layer"
        )
    return model.eval()


def compare_states(a: HiddenStates, b: HiddenStates) -> list[StateDifference]:
    """Compares two models' states place by place, in the order of the forward pass.

    Raises `UserError` if depths, widths or vocabularies differ.
    """
    if len(a.layers) != len(b.layers):
        raise UserError(
            f"the models have {len(a.layers)} and {len(b.layers)} layers; only models of one "
            "architecture can be compared by their hidden states"
        )
    differences = []
    for (place, states_a), (_, states_b) in zip(a.by_place(), b.by_place(), strict=True):
        if states_a[0].shape[1] != states_b[0].shape[1]:
            raise UserError(
                f"the models' {place} is {states_a[0].shape[1]} and {states_b[0].shape[1]} wide; "
                "only models of one architecture can be compared by their hidden states"
            )
        of_sequences = (
            _difference(place, number, one, other)
            for number, (one, other) in enumerate(zip(states_a, states_b, strict=True))
        )
        found = list(of_sequences)
        worst = max(found, key=lambda difference: difference.relative)
        absolute = max(difference.absolute for difference in found)
        differences.append(StateDifference(**{**vars(worst), "absolute": absolute}))
    return differences


def _difference(place: str, sequence: int, a: Tensor, b: Tensor) -> StateDifference:
    """The position of a sequence where two tensors [length, width] differ most."""
    # NaN and infinity do not count as magnitude, which would hide other differences.
    magnitude = torch.maximum(a.abs(), b.abs()).nan_to_num(nan=0.0, posinf=0.0).amax(dim=1)
    differing = absolute_difference(a, b)
    relative = differing.amax(dim=1) / magnitude.clamp(min=1.0)
    position = int(relative.argmax())
    channel = int(differing[position].argmax())
    return StateDifference(
        place=place,
        relative=float(relative[position]),
        absolute=float(differing.max()),
        sequence=sequence,
        position=position,
        channel=channel,
        a=float(a[position, channel]),
        b=float(b[position, channel]),
    )
