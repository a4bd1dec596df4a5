"""Reads ps_bank.pt, in which the reference implementation keeps a bridge.

A dictionary saved by torch (ShenzhiYang2000/OPRD, scripts/analysis/cross_arch_preexp2_train_ps.py):

    rank                int
    projector_type      "linear" (the only kind read here) or "mlp"
    layer_pairs         [{"student_layer": s, "teacher_layer": t}], counted from 0
    state_dict          "projectors.s{s}_t{t}.weight"  P_S [r, d_S]
    frozen_pt_weights   "s{s}_t{t}"                    P_T [r, d_T]
    frozen_pt_means     "s{s}_t{t}"                    mu_T [d_T]

Layer l is Hugging Face's hidden_states[l + 1], so the last one is after the final norm, at the
positions that hold the response's tokens. The file does not name its models. The other two kinds
of the same script have a ``subspace_mode`` and other projectors.
"""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.bridge.source import BUILD_ANOTHER, check_pairs
from megatron_oprd.config import TapConfig
from megatron_oprd.errors import UserError
from megatron_oprd.losses.bridge import Projectors
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.taps.layer_map import LayerPair


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
