"""A bridge on disk: the projectors of every mapped pair, and what they were made of.

A folder holds bridge.safetensors, with fp32 tensors

    student.<layer>.weight  P_S [r, d_S]        teacher.<layer>.weight  P_T [r, d_T]
                                                teacher.<layer>.mean    mu_T [d_T]

by student and by teacher layer, counted from 0, and manifest.json, a `Manifest`. The rows of P_T
are ordered by the variance that they explain, so the first rows of both are a bridge of lower rank.
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
    """A bridge on disk, of which no projector was read yet."""

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
        """Checks that the bridge fits a run.

        Raises:
            UserError: It was made for something else; the message names what.
        """

    def read(self, pairs: Iterable[LayerPair], *, rank: int, device: torch.device) -> Projectors:
        """Reads the projectors of some pairs, and their leading ``rank`` rows only."""


def check_pairs(path: Path, wanted: Iterable[LayerPair], found: Iterable[LayerPair]) -> None:
    """Checks that a bridge has the pairs that a run wants.

    Raises:
        UserError: A student layer is missing, or matched with another teacher layer.
    """
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
# What a model may have otherwise than the one that a bridge was made with: none of it changes what
# a layer puts out.
_NOT_COMPARED = ("vocab_size", "max_position_embeddings", "tied")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bridge was made of, and how good it is.

    Attributes:
        student: The student's ``name`` and ``architecture`` (`architecture_numbers`).
        teacher: The teacher's, likewise.
        layer_pairs: (student layer, teacher layer), counted from 0, by rising student layer.
        positions: Response positions whose states it was fitted on.
        k: For last_k and first_k.
        alignment: Which position belongs to a response token.
        last_layer: Whether a model's last layer was taken after the final norm.
        rank: Rows r of every projector.
        fit: How P_S was fitted, and every number that enters.
        data: Prompts, sampling, seed, and how many sequences and rows were used.
        cosine: By rank (as text): mean cosine of the projected states on held-out sequences, of a
            random P_S (``before``) and of the fitted one (``after``), a list by pair each.
    """

    student: dict[str, Any]
    teacher: dict[str, Any]
    layer_pairs: list[tuple[int, int]]
    positions: str
    k: int | None
    alignment: str
    last_layer: str
    rank: int
    fit: dict[str, Any]
    data: dict[str, Any]
    cosine: dict[str, dict[str, list[float]]]


class BridgeFolder:
    """A bridge folder, opened for reading.

    Attributes:
        folder: The folder.
        manifest: What it says of itself.

    Raises:
        UserError: The folder is no bridge, or is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self._file = SafetensorsFile(folder / TENSORS_FILE)
        for student, teacher in self.manifest.layer_pairs:
            for name in _names(student, teacher):
                if name not in self._file.tensors:
                    raise UserError(f"bridge.path = {folder}: {TENSORS_FILE} has no {name}")

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

        Of a model every number of its configuration that enters a layer is compared (its
        `architecture_numbers`), but not its weights: a student that was trained on goes on through
        the same bridge. Layers may be fewer than the bridge has. Which of the response's positions
        are supervised (``taps.positions``) may differ from those the bridge was fitted on.

        Raises:
            UserError: It is of another model, another layer map, another ``taps.alignment`` or
                another ``taps.last_layer``.
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
                    f"{wanted}. {BUILD_ANOTHER}"
                )

    def read(self, pairs: Iterable[LayerPair], *, rank: int, device: torch.device) -> Projectors:
        """Reads the projectors of some pairs, and their leading ``rank`` rows only."""
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
    """Checks that a bridge may be written to ``out``: a place without a folder, or of a bridge.

    Raises:
        UserError: It may not.
    """
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
    """Writes a bridge folder, whole or not at all; a bridge that is at ``out`` is replaced.

    Args:
        out: The folder.
        projectors: Of every pair of the manifest, of its rank.
        manifest: What it was made of.
        files: More files of the folder, by name.

    Raises:
        UserError: ``out`` is taken by something else, or cannot be written.
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
    """What of a model's configuration its layers' outputs depend on, as JSON gives it back."""
    numbers = dataclasses.asdict(architecture)
    kept = {name: value for name, value in numbers.items() if name not in _NOT_COMPARED}
    return json.loads(json.dumps(kept))


def _names(student: int, teacher: int) -> tuple[str, str, str]:
    return f"student.{student}.weight", f"teacher.{teacher}.weight", f"teacher.{teacher}.mean"


def _read_manifest(folder: Path) -> Manifest:
    file = folder / MANIFEST_FILE
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"bridge.path = {folder}: there is no {MANIFEST_FILE}; give a folder that "
            "python -m megatron_oprd.build_bridge wrote, or a ps_bank.pt"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"bridge.path: cannot read {file}: {error}") from error
    fields = {field.name for field in dataclasses.fields(Manifest)}
    if not isinstance(content, dict) or content.get("kind") != _KIND or fields - content.keys():
        raise UserError(f"bridge.path = {folder}: {MANIFEST_FILE} is not that of a bridge")
    known = {name: value for name, value in content.items() if name in fields}
    known["layer_pairs"] = [(student, teacher) for student, teacher in known["layer_pairs"]]
    return Manifest(**known)


class PSBank:
    """A ps_bank.pt, read whole: projectors are small.

    Attributes:
        path: The file.
        rank: Rows of every projector.

    Raises:
        UserError: The file cannot be read, is not of the linear kind, or lacks a projector.
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
                    f"bridge.path = {self.path}: pair {key} has {len(student)} and {len(teacher)} "
                    f"rows, rank is {self._rank}"
                )
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
        """Checks that the bridge fits a run, as far as the file says: widths, layers, positions.

        Raises:
            UserError: It does not.
        """
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
        for name, made_with in (("alignment", "token"), ("last_layer", "post_norm")):
            if getattr(taps, name) != made_with:
                raise UserError(
                    f"bridge.path = {self.path}: the reference implementation's bridges are made "
                    f"with taps.{name} = {made_with}, the run has {getattr(taps, name)}. "
                    f"{BUILD_ANOTHER}"
                )

    def read(self, pairs: Iterable[LayerPair], *, rank: int, device: torch.device) -> Projectors:
        """The projectors of some pairs, and their leading ``rank`` rows only."""
        pairs = list(pairs)
        return Projectors(
            student={p.student: self._student[p.student][:rank].to(device) for p in pairs},
            teacher={p.teacher: self._teacher[p.teacher][:rank].to(device) for p in pairs},
            mean={p.teacher: self._mean[p.teacher].to(device) for p in pairs},
        )


def _load(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"bridge.path: cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"bridge.path = {path} is not a ps_bank.pt: it holds no dictionary")
    return content


def open_bridge(path: Path) -> BridgeSource:
    """Opens a bridge: a folder of this format, or the reference implementation's ps_bank.pt.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    return PSBank(path) if path.suffix == ".pt" else BridgeFolder(path)
