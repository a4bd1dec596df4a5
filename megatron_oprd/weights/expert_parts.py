"""Experts that a folder has stacked, as GPT-OSS does, one by one: reading and writing.

``experts.gate_up_proj`` [e, h, 2 f] has gate and up columns by turns, ``experts.down_proj`` is
[e, f, h]; the biases ``gate_up_proj_bias`` [e, 2 f] and ``down_proj_bias`` [e, h] likewise. The
part of expert 3 is called ``experts.gate_up_proj[3]``. It has rows for outputs, as Megatron's
weights have: gate rows, then up rows, [2 f, h]; down [h, f].
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.weights.mapping import Mapping
from megatron_oprd.weights.positioned_reads import slice_bounds, slices_of
from megatron_oprd.weights.source import WeightSource

_STACK = re.compile(r".+\.mlp\.experts\.(gate_up|down)_proj(_bias)?")
_PART = re.compile(r"(.+\.mlp\.experts\.(?:gate_up|down)_proj(?:_bias)?)\[(\d+)\]")

Shape = tuple[int, ...]


def _to_part(name: str, stored: Tensor) -> Tensor:
    """An expert's part of the stack ``name``, of its values as stored."""
    # Columns of a matrix, or numbers of a bias: gate 0, up 0, gate 1, ...
    if ".gate_up_proj" in name:
        stored = torch.cat([stored[..., 0::2], stored[..., 1::2]], dim=-1)
    return stored.mT.contiguous() if stored.dim() == 2 else stored


def _of_part(name: str, part: Tensor) -> Tensor:
    """The values as stored, of an expert's part: `_to_part` backwards."""
    stored = part.mT if part.dim() == 2 else part
    if ".gate_up_proj" in name:
        stored = torch.stack(stored.chunk(2, dim=-1), dim=-1).flatten(-2)
    return stored


def has_parts(table: Iterable[Mapping]) -> bool:
    """Whether a model's parameters are made of experts' parts."""
    return any(_PART.fullmatch(name) for mapping in table for name in mapping.hf)


def stored_shapes(table: Iterable[Mapping]) -> dict[str, Shape]:
    """Names and shapes of a model's tensors as a folder has them, in the table's order."""
    return _stored((name, shape) for mapping in table for name, shape in mapping.hf.items())


def _stored(parts: Iterable[tuple[str, Shape]]) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for name, shape in parts:
        match = _PART.fullmatch(name)
        if match is None:
            found[name] = shape
        else:
            count, *_ = found.get(match[1], (0,))
            found[match[1]] = (count + 1, *reversed(shape))
    return found


def stored_names(names: Iterable[str]) -> Iterator[str]:
    """The names of the tensors that parts belong to; other names as they are."""
    for name in names:
        match = _PART.fullmatch(name)
        yield name if match is None else match[1]


def stacked(
    parts: Iterable[tuple[str, Tensor | None]], shapes: dict[str, Shape]
) -> Iterator[tuple[str, Tensor | None]]:
    """Puts the parts of a stream together; ``shapes`` are the result of `stored_shapes`.

    A stack is given when its last part has come. Stacks are in memory until then: those of one
    layer. None stands for tensors that are not wanted here.
    """
    stacks: dict[str, Tensor] = {}
    for name, tensor in parts:
        match = _PART.fullmatch(name)
        if match is None:
            yield name, tensor
            continue
        stack, expert = match[1], int(match[2])
        if tensor is not None:
            if stack not in stacks:
                stacks[stack] = tensor.new_empty(shapes[stack])
            stacks[stack][expert] = _of_part(stack, tensor)
        # Experts come in their order.
        if expert == shapes[stack][0] - 1:
            yield stack, stacks.pop(stack, None)


class ExpertParts:
    """A Hugging Face folder with GPT-OSS's stacks, read as one tensor per expert and layer."""

    def __init__(self, checkpoint: WeightSource) -> None:
        self._checkpoint = checkpoint
        # The part that was read last: it is asked for in pieces, and its rows lie apart on disk.
        self._last: tuple[str, Tensor] | None = None

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._checkpoint.folder

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return self._checkpoint.config

    @property
    def hf_folder(self) -> Path:
        """The folder with config.json and the companion files."""
        return self._checkpoint.hf_folder

    def names(self) -> list[str]:
        """The tensors' names, one for each expert's part."""
        names: list[str] = []
        for name in self._checkpoint.names():
            if _STACK.fullmatch(name) is None:
                names.append(name)
            else:
                names += [f"{name}[{expert}]" for expert in range(self._checkpoint.shape(name)[0])]
        return names

    def shape(self, name: str) -> Shape:
        """The shape of a tensor."""
        match = _PART.fullmatch(name)
        if match is None:
            return self._checkpoint.shape(name)
        return tuple(reversed(self._checkpoint.shape(match[1])[1:]))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._checkpoint.dtype(*stored_names([name]))

    def num_bytes(self) -> int:
        """The bytes of all tensors together."""
        return self._checkpoint.num_bytes()

    def read(self, name: str) -> Tensor:
        """Reads a whole tensor."""
        return self.read_slice(name)

    def read_slice(self, name: str, *slices: slice, out: Tensor | None = None) -> Tensor:
        """Reads a part of a tensor; the arguments are those of `WeightSource.read_slice`."""
        match = _PART.fullmatch(name)
        if match is None:
            return self._checkpoint.read_slice(name, *slices, out=out)
        last = self._last
        if last is None or last[0] != name:
            stack, expert = match[1], int(match[2])
            stored = self._checkpoint.read_slice(stack, slice(expert, expert + 1))[0]
            last = self._last = (name, _to_part(stack, stored))
        found = last[1][slices_of(slice_bounds(name, self.shape(name), slices))]
        return found.clone() if out is None else out.copy_(found)

    def companion_files(self) -> list[Path]:
        """The files that an exported model carries along."""
        return self._checkpoint.companion_files()

    def files(self) -> list[Path]:
        """The files that config and tensors are read from."""
        return self._checkpoint.files()


class Stacked:
    """A source with parts of experts, read as the folder that has them stacked."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._shapes = _stored((name, source.shape(name)) for name in source.names())
        # A part's name, or the first of a stack's.
        self._first = dict(
            zip(stored_names(reversed(source.names())), reversed(source.names()), strict=True)
        )

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._source.folder

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return self._source.config

    @property
    def hf_folder(self) -> Path:
        """The folder with config.json and the companion files."""
        return self._source.hf_folder

    def names(self) -> list[str]:
        """The tensors' names."""
        return list(self._shapes)

    def shape(self, name: str) -> Shape:
        """The shape of a tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._source.dtype(self._first[name])

    def num_bytes(self) -> int:
        """The bytes of all tensors together."""
        return self._source.num_bytes()

    def read(self, name: str) -> Tensor:
        """Reads a whole tensor."""
        return self.read_slice(name)

    def read_slice(self, name: str, *slices: slice, out: Tensor | None = None) -> Tensor:
        """Reads a tensor; of a stack, the whole one only."""
        if self._first[name] == name:
            return self._source.read_slice(name, *slices, out=out)
        assert not slices, "stacks are written whole"
        if out is None:
            out = torch.empty(self.shape(name), dtype=self.dtype(name))
        for expert in range(len(out)):
            out[expert] = _of_part(name, self._source.read(f"{name}[{expert}]"))
        return out

    def companion_files(self) -> list[Path]:
        """The files that an exported model carries along."""
        return self._source.companion_files()

    def files(self) -> list[Path]:
        """The files that config and tensors are read from."""
        return self._source.files()
