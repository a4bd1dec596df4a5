"""Reads Megatron checkpoints as Hugging Face tensors, through a model's table of mappings."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.errors import UserError
from megatron_oprd.weights.accounting import EMBEDDING as HF_EMBEDDING
from megatron_oprd.weights.accounting import HEAD, refuse_differences
from megatron_oprd.weights.casting import dtype_name
from megatron_oprd.weights.hf_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, HFFolder
from megatron_oprd.weights.mapping import Mapping, Vocabulary
from megatron_oprd.weights.megatron_keys import (
    EMBEDDING,
    OUTPUT_LAYER,
    Slot,
    halves,
    is_gated,
    is_no_weight,
    num_layers,
    slots,
)
from megatron_oprd.weights.output_folder import MANIFEST_FILE
from megatron_oprd.weights.positioned_reads import (
    Bounds,
    bounds_of,
    common,
    moved,
    shape_of,
    slice_bounds,
    slices_of,
)
from megatron_oprd.weights.torch_dist_files import (
    FORMAT_FILE,
    METADATA_FILE,
    TRACKER_FILE,
    TorchDistFiles,
    read_tracker,
)

HF_FOLDER = "hf"  # subfolder with config.json and companion files
_RUN_FOLDER = "checkpoints"  # subfolder of a training run
_STEP = re.compile(r"step_(\d{7,})")  # a training checkpoint, by step


@dataclass(frozen=True, kw_only=True)
class SourceTensors:
    """Facts about the Hugging Face tensors that a conversion read, for the way back."""

    # By name, in the source's order.
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    # Tensors stored twice (a tied LM head), mapped to the tensor that they equal.
    copies: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Entries for the manifest, which `of_manifest` reads."""
        dtypes = {name: dtype_name(dtype) for name, dtype in self.dtypes.items()}
        return {"hf_dtypes": dtypes, "hf_copies": self.copies}

    @classmethod
    def of_manifest(cls, manifest: dict[str, Any]) -> "SourceTensors | None":
        """Parses a manifest; None if no conversion wrote it."""
        if "hf_dtypes" not in manifest:
            return None
        dtypes = {name: getattr(torch, dtype) for name, dtype in manifest["hf_dtypes"].items()}
        return cls(dtypes=dtypes, copies=manifest["hf_copies"])


@dataclass(frozen=True, kw_only=True)
class _Home:
    """A parameter's location: one tensor, or two that hold a half of its rows each."""

    mapping: Mapping
    slot: Slot
    keys: tuple[str, ...]


class MegatronCheckpoint:
    """A `torch_dist` checkpoint of a known model, as a `WeightSource`.

    Accepts all ways in which Megatron stores layers and experts (`megatron_keys`) and any padding
    of the vocabulary, with ``table`` padded to `embedding_rows`. Skips optimizer states, random
    states and everything else that is not a weight. Raises `UserError` for any other missing or
    unexpected tensor.
    """

    folder: Path
    config: dict[str, Any]

    def __init__(self, files: TorchDistFiles, hf: HFFolder, table: Sequence[Mapping]):
        self.folder = files.folder
        self.config = hf.config
        self._hf = hf
        self._files = files
        homes = _find_homes(files, _with_stored_head(files, table))
        self._homes = {name: home for home in homes for name in home.mapping.hf}
        source = _read_source_tensors(files.folder)
        if source is None:
            self._dtypes = {name: files.dtype(home.keys[0]) for name, home in self._homes.items()}
            self._copies: dict[str, str] = {}
            return
        refuse_differences(
            f"{files.folder}, whose {MANIFEST_FILE} lists what it was made of",
            expected=self._homes.keys() | source.copies.keys(),
            found=source.dtypes,
        )
        self._dtypes, self._copies = source.dtypes, source.copies

    @property
    def hf_folder(self) -> Path:
        """The folder with config.json and the companion files."""
        return self._hf.folder

    def names(self) -> list[str]:
        """The tensors' Hugging Face names, in the order of the converted model."""
        return list(self._dtypes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor ``name``; `UserError` if the checkpoint has no such tensor."""
        original, home = self._home(name)
        return home.mapping.hf[original]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of ``name`` before the conversion; for other checkpoints, as stored."""
        self._home(name)
        return self._dtypes[name]

    def num_bytes(self) -> int:
        """The total size of all tensors in these dtypes."""
        return sum(prod(self.shape(name)) * self.dtype(name).itemsize for name in self._dtypes)

    def read(self, name: str) -> Tensor:
        """Reads the whole tensor ``name`` into a new contiguous CPU tensor."""
        return self.read_slice(name)

    def read_slice(self, name: str, *slices: slice, out: Tensor | None = None) -> Tensor:
        """Implements `WeightSource.read_slice`; the result has the dtype `dtype(name)`."""
        original, home = self._home(name)
        bounds = slice_bounds(name, home.mapping.hf[original], slices)
        if out is None:
            out = torch.empty(shape_of(bounds), dtype=self._dtypes[name])
        # Rank 0 of 1: the pieces of the whole, unsplit parameter.
        for piece in home.mapping.pieces(0, 1):
            there, here = bounds_of(piece.hf_index), bounds_of(piece.local_index)
            both = common(bounds, there) if piece.hf == original else None
            if both is not None:
                target = out[slices_of(moved(both, bounds))]
                self._read_parameter(home, moved(both, there, here), target)
        return out

    def companion_files(self) -> list[Path]:
        """The files that an exported model carries along."""
        return self._hf.companion_files()

    def files(self) -> list[Path]:
        """The files that hold the configuration and the tensors."""
        return [self._hf.folder / CONFIG_FILE, *self._files.files()]

    def _home(self, name: str) -> tuple[str, _Home]:
        """The tensor that ``name`` is a copy of (or itself), and its location."""
        original = self._copies.get(name, name)
        if name not in self._dtypes:
            raise UserError(f"checkpoint {self.folder} has no tensor {name!r}.")
        return original, self._homes[original]

    def _read_parameter(self, home: _Home, bounds: Bounds, out: Tensor) -> None:
        """Reads a rectangle of a Megatron parameter."""
        # The leading dimensions select one layer and one expert.
        first = tuple(slice(one, one + 1) for one in home.slot.index)
        rows = home.mapping.local_shape(1)[0] // len(home.keys)
        for number, key in enumerate(home.keys):
            own = [(number * rows, (number + 1) * rows), *bounds[1:]]
            both = common(bounds, own)
            if both is None:
                continue
            target = out[slices_of(moved(both, bounds))][(None,) * len(first)]
            # Rows are relative to the half; columns are the same in both.
            cut = (*first, *slices_of([moved(both, own)[0], *both[1:]]))
            if target.is_contiguous() and target.dtype == self._files.dtype(key):
                self._files.read_slice(key, *cut, out=target)
            else:
                target.copy_(self._files.read_slice(key, *cut))


def embedding_rows(files: TorchDistFiles) -> int:
    """Rows of the stored embedding, padding included; `UserError` if it has none."""
    if EMBEDDING not in files.names():
        found = ", ".join(sorted(files.names())[:3]) or "none"
        raise UserError(
            f"checkpoint {files.folder} has no tensor {EMBEDDING!r}, so it is no GPT model of "
            f"Megatron's; its first tensors: {found}."
        )
    return files.shape(EMBEDDING)[0]


def resolve_checkpoint_folder(path: Path) -> Path:
    """The checkpoint that a path refers to; `UserError` if it names one that does not exist.

    A checkpoint refers to itself, a Megatron folder to the checkpoint named in
    latest_checkpointed_iteration.txt, the folder of one of our runs to its newest checkpoint.
    """
    if _is_hugging_face(path) or _is_torch_dist(path):
        return path
    tracker = path / TRACKER_FILE
    if tracker.is_file():
        name = read_tracker(path)
        if name is None or not (path / name).is_dir():
            raise UserError(
                f"{tracker} says {tracker.read_text().strip()!r}, and there is no folder of such a "
                "checkpoint; copy the checkpoint again, or give the folder of another iteration."
            )
        return path / name
    for folder in (path / _RUN_FOLDER, path):
        steps = [one for one in _folders(folder) if _STEP.fullmatch(one.name)]
        if steps:
            return max(steps, key=lambda one: int(one.name.removeprefix("step_")))
    return path


def is_megatron(path: Path) -> bool:
    """Whether a folder is or contains a Megatron checkpoint of any format."""
    if _is_hugging_face(path):
        return False
    folder = resolve_checkpoint_folder(path)
    return _is_torch_dist(folder) or any(folder.glob("mp_rank_*"))


def _is_hugging_face(path: Path) -> bool:
    """Whether a folder has a Hugging Face model, whatever else is in it."""
    weights = (SINGLE_FILE, INDEX_FILE)
    has_weights = any((path / name).exists() for name in weights)
    return (path / CONFIG_FILE).is_file() and has_weights and not _says_its_format(path)


def _is_torch_dist(folder: Path) -> bool:
    return (folder / METADATA_FILE).exists() or _says_its_format(folder)


def _says_its_format(folder: Path) -> bool:
    """Whether metadata.json is Megatron's; other tools use this file name, too."""
    try:
        content = json.loads((folder / FORMAT_FILE).read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        # Damaged: treated as Megatron's, so that check_format reports it, unless a config.json
        # suggests another owner.
        return not (folder / CONFIG_FILE).is_file()
    return isinstance(content, dict) and "sharded_backend" in content


def _folders(folder: Path) -> Iterator[Path]:
    return (one for one in folder.iterdir() if one.is_dir()) if folder.is_dir() else iter(())


def _with_stored_head(files: TorchDistFiles, table: Sequence[Mapping]) -> list[Mapping]:
    """Adds the LM head of a tied model to the table if the checkpoint stores it."""
    known = {mapping.megatron: mapping for mapping in table}
    if OUTPUT_LAYER in known or OUTPUT_LAYER not in files.names():
        return list(table)
    embedding = known[EMBEDDING]
    assert isinstance(embedding, Vocabulary)
    head = Vocabulary(
        megatron=OUTPUT_LAYER,
        hf={HEAD: embedding.hf[HF_EMBEDDING]},
        padded_vocab_size=embedding.padded_vocab_size,
    )
    return [*table, head]


def _find_homes(files: TorchDistFiles, table: Sequence[Mapping]) -> list[_Home]:
    """Locates every parameter; raises if a tensor of the model is missing or left unused."""
    present = {name for name in files.names() if not is_no_weight(name)}
    layers = num_layers(table)
    homes, missing = [], []
    for mapping in table:
        home = _find_home(present, mapping, layers)
        if home is None:
            missing.append(mapping.megatron)
            continue
        homes.append(home)
        rows, *columns = mapping.local_shape(1)
        expected = (*home.slot.counts, rows // len(home.keys), *columns)
        for key in home.keys:
            if files.shape(key) != expected:
                raise UserError(
                    f"{files.folder}: {key} has shape {list(files.shape(key))}; its configuration "
                    f"says {list(expected)}"
                )
    used = {key for home in homes for key in home.keys}
    refuse_differences(str(files.folder), expected=[*used, *missing], found=present)
    return homes


def _find_home(present: set[str], mapping: Mapping, layers: int) -> _Home | None:
    for slot in slots(mapping, layers):
        if slot.key in present:
            return _Home(mapping=mapping, slot=slot, keys=(slot.key,))
        if is_gated(mapping) and present.issuperset(halves(slot.key)):
            return _Home(mapping=mapping, slot=slot, keys=halves(slot.key))
    return None


def _read_source_tensors(folder: Path) -> SourceTensors | None:
    """Reads the manifest in the checkpoint or next to it."""
    for path in (folder / MANIFEST_FILE, folder.parent / MANIFEST_FILE):
        try:
            manifest = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}; copy the checkpoint again.") from None
        if (source := SourceTensors.of_manifest(manifest)) is not None:
            return source
    return None
