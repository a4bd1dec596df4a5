"""The file format of a bridge: the projectors of every mapped pair, and a manifest.

A folder holds manifest.json, a `Manifest`, and bridge.safetensors with fp32 tensors

    student.<layer>.weight  P_S [r, d_S]        teacher.<layer>.weight  P_T [r, d_T]
                                                teacher.<layer>.mean    mu_T [d_T]

by student and by teacher layer, counted from 0.
"""

import dataclasses
import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_oprd.config.schema import TapConfig
from megatron_oprd.distill.layer_map import LayerPair
from megatron_oprd.distill.projectors import Projectors
from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.weights.disk import writing
from megatron_oprd.weights.output_folder import MANIFEST_FILE, OutputFolder, check_output_folder
from megatron_oprd.weights.safetensors_file import SafetensorsFile

BUILD_ANOTHER = "Build one for this run with python -m megatron_oprd.build_bridge"


class BridgeSource(Protocol):
    """A bridge on disk; `read` loads its projectors."""

    @property
    def rank(self) -> int:
        """Rows of every projector."""

    def check(
        self,
        *,
        student: Architecture,
        teacher: Architecture,
        pairs: Iterable[LayerPair],
        taps: TapConfig,
    ) -> None:
        """Checks that the bridge fits a run; raises a UserError that names the first mismatch."""

    def read(self, pairs: Iterable[LayerPair], *, rank: int, device: torch.device) -> Projectors:
        """Reads the projectors of ``pairs``, truncated to their leading ``rank`` rows."""


def check_pairs(path: Path, wanted: Iterable[LayerPair], found: Iterable[LayerPair]) -> None:
    """Raises a UserError if a student layer is missing, or matched with another teacher layer."""
    teacher_of = {pair.student: pair.teacher for pair in found}
    for pair in wanted:
        if pair.student not in teacher_of:
            has = ", ".join(map(str, sorted(teacher_of)))
            raise UserError(
                f"taps.layers selects student layer {pair.student}, which bridge.path = {path} "
                f"does not have (it has {has}). {BUILD_ANOTHER}"
            )
        if teacher_of[pair.student] != pair.teacher:
            raise UserError(
                f"bridge.path = {path} matches student layer {pair.student} with teacher layer "
                f"{teacher_of[pair.student]}, taps.layer_map with {pair.teacher}. {BUILD_ANOTHER}"
            )


TENSORS_FILE = "bridge.safetensors"
PICTURE_FILE = "cosine.png"
_KIND = "oprd_bridge"
# Fields that may differ between the run's model and the bridge's: they do not affect the output of
# any layer.
_NOT_COMPARED = ("vocab_size", "max_position_embeddings", "tied")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of manifest.json: how the bridge was made, and its quality."""

    # The ``name`` and ``architecture`` (`architecture_numbers`) of each model.
    student: dict[str, Any]
    teacher: dict[str, Any]
    # (student layer, teacher layer) from 0, by rising student layer
    layer_pairs: list[tuple[int, int]]
    positions: str  # taps.positions of the states that the bridge was fitted on
    k: int | None  # for last_k and first_k
    alignment: str
    last_layer: str
    rank: int
    # The method and every number used to fit P_S.
    fit: dict[str, Any]
    # Prompts, sampling and seed, and the number of sequences and rows used.
    data: dict[str, Any]
    # By rank (as text): the mean cosine of the projected states on held-out sequences by pair, for
    # a random P_S (``before``) and for the fitted one (``after``).
    cosine: dict[str, dict[str, list[float]]]


class BridgeFolder:
    """A bridge folder, opened for reading; raises a UserError if it holds no complete bridge."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self._file = SafetensorsFile(folder / TENSORS_FILE)
        for student, teacher in self.manifest.layer_pairs:
            for name in _names(student, teacher):
                if name not in self._file.tensors:
                    raise UserError(
                        f"bridge.path = {folder} has a {TENSORS_FILE} without {name}. "
                        f"{BUILD_ANOTHER}"
                    )

    @property
    def rank(self) -> int:
        """Rows of every projector."""
        return self.manifest.rank

    def check(
        self,
        *,
        student: Architecture,
        teacher: Architecture,
        pairs: Iterable[LayerPair],
        taps: TapConfig,
    ) -> None:
        """Checks that the bridge fits a run.

        Compares every number in each model's configuration that affects a layer
        (`architecture_numbers`) but not the weights: a student that was trained further keeps using
        the same bridge. A run may use fewer layers than the bridge has, and other
        ``taps.positions`` than the bridge was fitted on.

        Raises:
            UserError: Another model, layer map, ``taps.alignment`` or ``taps.last_layer``.
        """
        manifest = self.manifest
        for model, of_bridge, of_run in (
            ("student", manifest.student, student),
            ("teacher", manifest.teacher, teacher),
        ):
            made_of = of_bridge["architecture"]
            for field, value in architecture_numbers(of_run).items():
                if made_of.get(field) != value:
                    raise UserError(
                        f"bridge.path = {self.folder} was made with {of_bridge['name']} as "
                        f"{model}, of {field} = {made_of.get(field)!r}; model.{model} has "
                        f"{value!r}. {BUILD_ANOTHER}"
                    )
        check_pairs(self.folder, pairs, [LayerPair(s, t) for s, t in manifest.layer_pairs])
        for name in ("alignment", "last_layer"):
            found, wanted = getattr(manifest, name), getattr(taps, name)
            if found != wanted:
                raise UserError(
                    f"bridge.path = {self.folder} was made with taps.{name} = {found}, the run has "
                    f"{wanted}; set taps.{name} = {found}. {BUILD_ANOTHER}"
                )

    def read(self, pairs: Iterable[LayerPair], *, rank: int, device: torch.device) -> Projectors:
        """Reads the projectors of ``pairs``, truncated to their leading ``rank`` rows."""
        # The rows of P_T are sorted by explained variance, so the leading rows of both projectors
        # are a bridge of lower rank.
        rows = slice(rank)
        pairs = list(pairs)

        def read(name: str, *slices: slice) -> Tensor:
            return self._file.read_slice(name, slices).to(device)

        return Projectors(
            student={p.student: read(f"student.{p.student}.weight", rows) for p in pairs},
            teacher={p.teacher: read(f"teacher.{p.teacher}.weight", rows) for p in pairs},
            mean={p.teacher: read(f"teacher.{p.teacher}.mean") for p in pairs},
        )


def check_bridge_place(out: Path) -> None:
    """Raises a UserError unless ``out`` is free: missing, empty, or with a bridge to replace."""
    if out.is_dir() and any(out.iterdir()):
        try:
            _read_manifest(out)
        except UserError as error:
            raise UserError(
                f"output_dir = {out} is not empty and holds no bridge that could be replaced; give "
                "another folder"
            ) from error
    check_output_folder(out, force=True)


def write_bridge(
    out: Path, projectors: Projectors, manifest: Manifest, *, files: dict[str, bytes] | None = None
) -> Path:
    """Writes a bridge folder atomically; replaces a bridge that exists at ``out``.

    ``projectors`` has every pair of the manifest, at its rank; ``files`` are further files by name.
    Raises a UserError if ``out`` is taken by something else, or cannot be written.
    """
    tensors = {f"student.{layer}.weight": one for layer, one in projectors.student.items()}
    tensors |= {f"teacher.{layer}.weight": one for layer, one in projectors.teacher.items()}
    tensors |= {f"teacher.{layer}.mean": one for layer, one in projectors.mean.items()}
    on_host = {name: one.float().cpu().contiguous() for name, one in tensors.items()}
    check_bridge_place(out)
    with OutputFolder(out, force=True) as folder, writing(out):
        save_file(on_host, folder.path / TENSORS_FILE)
        for name, content in (files or {}).items():
            (folder.path / name).write_bytes(content)
        return folder.commit({"kind": _KIND, **dataclasses.asdict(manifest)})


def architecture_numbers(architecture: Architecture) -> dict[str, Any]:
    """The configuration fields that affect a layer's output, as JSON values."""
    numbers = dataclasses.asdict(architecture)
    kept = {name: value for name, value in numbers.items() if name not in _NOT_COMPARED}
    # Through JSON, because tuples become lists there and would not equal those of a manifest.
    return json.loads(json.dumps(kept))


def _names(student: int, teacher: int) -> tuple[str, str, str]:
    return f"student.{student}.weight", f"teacher.{teacher}.weight", f"teacher.{teacher}.mean"


def _read_manifest(folder: Path) -> Manifest:
    file = folder / MANIFEST_FILE
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"bridge.path = {folder} has no {MANIFEST_FILE}; give a folder that python -m "
            "megatron_oprd.build_bridge wrote, or a ps_bank.pt"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"bridge.path: cannot read {file}: {error}") from error
    fields = {field.name for field in dataclasses.fields(Manifest)}
    if not isinstance(content, dict) or content.get("kind") != _KIND or fields - content.keys():
        raise UserError(
            f"bridge.path = {folder} has a {MANIFEST_FILE} that is not a bridge's; give a folder "
            "that python -m megatron_oprd.build_bridge wrote"
        )
    known = {name: value for name, value in content.items() if name in fields}
    known["layer_pairs"] = [(student, teacher) for student, teacher in known["layer_pairs"]]
    return Manifest(**known)


class PSBank:
    """A ps_bank.pt of the reference implementation, read whole (projectors are small).

    Raises a UserError if it cannot be read, is not of the linear kind, or lacks a projector.
    """

    path: Path

    def __init__(self, path: Path) -> None:
        self.path = path
        content = _load(path)
        kind = content.get("projector_type", "linear"), content.get("subspace_mode", "full")
        if kind != ("linear", "full"):
            raise UserError(
                f"bridge.path = {path} has projector_type = {kind[0]!r} and subspace_mode = "
                f"{kind[1]!r}; only linear projectors of the full space are read. {BUILD_ANOTHER}"
            )
        try:
            self._read_projectors(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"bridge.path = {path} is not a ps_bank.pt of the reference implementation: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _read_projectors(self, content: dict[str, Any]) -> None:
        self._pairs = [
            LayerPair(one["student_layer"], one["teacher_layer"]) for one in content["layer_pairs"]
        ]
        self._rank = int(content["rank"])
        self._student: dict[int, Tensor] = {}
        self._teacher: dict[int, Tensor] = {}
        self._mean: dict[int, Tensor] = {}
        for pair in self._pairs:
            key = f"s{pair.student}_t{pair.teacher}"
            student = content["state_dict"][f"projectors.{key}.weight"].float()
            teacher = content["frozen_pt_weights"][key].float()
            mean = content["frozen_pt_means"][key].float()
            if not len(student) == len(teacher) == self._rank:
                raise UserError(
                    f"bridge.path = {self.path} has projectors of {len(student)} and "
                    f"{len(teacher)} rows for pair {key}, but rank {self._rank}. {BUILD_ANOTHER}"
                )
            # The file has projectors by pair, `Projectors` by layer: two pairs that share a teacher
            # layer have to agree.
            known = self._teacher.setdefault(pair.teacher, teacher)
            if not (
                torch.equal(known, teacher)
                and torch.equal(self._mean.setdefault(pair.teacher, mean), mean)
            ):
                raise UserError(
                    f"bridge.path = {self.path}: teacher layer {pair.teacher} has two different "
                    f"projectors. {BUILD_ANOTHER}"
                )
            self._student[pair.student] = student

    @property
    def rank(self) -> int:
        """Rows of every projector."""
        return self._rank

    def check(
        self,
        *,
        student: Architecture,
        teacher: Architecture,
        pairs: Iterable[LayerPair],
        taps: TapConfig,
    ) -> None:
        """Checks widths, layers and the reference code's fixed settings; raises a UserError."""
        check_pairs(self.path, pairs, self._pairs)
        for model, found, architecture in (
            ("student", self._student, student),
            ("teacher", self._teacher, teacher),
        ):
            for weight in found.values():
                if weight.shape[1] != architecture.hidden_size:
                    raise UserError(
                        f"bridge.path = {self.path} is for a {model} {weight.shape[1]} wide, "
                        f"model.{model} is {architecture.hidden_size} wide. {BUILD_ANOTHER}"
                    )
        # The file does not record these two; the reference code has no other choice.
        for name, made_with in (("alignment", "token"), ("last_layer", "post_norm")):
            if getattr(taps, name) != made_with:
                raise UserError(
                    f"bridge.path = {self.path}: the reference implementation's bridges are made "
                    f"with taps.{name} = {made_with}, the run has {getattr(taps, name)}; set "
                    f"taps.{name} = {made_with}. {BUILD_ANOTHER}"
                )

    def read(self, pairs: Iterable[LayerPair], *, rank: int, device: torch.device) -> Projectors:
        """Reads the projectors of ``pairs``, truncated to their leading ``rank`` rows."""
        pairs = list(pairs)
        return Projectors(
            student={p.student: self._student[p.student][:rank].to(device) for p in pairs},
            teacher={p.teacher: self._teacher[p.teacher][:rank].to(device) for p in pairs},
            mean={p.teacher: self._mean[p.teacher].to(device) for p in pairs},
        )


def _load(path: Path) -> dict[str, Any]:
    try:
        # weights_only: a pickle from elsewhere must not run code.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"bridge.path: cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"bridge.path = {path} is not a ps_bank.pt, because it holds no dictionary; give the "
            "reference implementation's file"
        )
    return content


def open_bridge(path: Path) -> BridgeSource:
    """Opens a bridge folder or the reference implementation's ps_bank.pt, or raises a UserError."""
    return PSBank(path) if path.suffix == ".pt" else BridgeFolder(path)
