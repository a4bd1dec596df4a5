"""Bridges with random projectors, between the models of a tiny pair."""

from pathlib import Path
from typing import Any

import torch

from megatron_oprd.distill.bridge_file import Manifest, architecture_numbers, write_bridge
from megatron_oprd.distill.layer_map import proportional_layer_map
from megatron_oprd.distill.projectors import Projectors
from megatron_oprd.models.open_checkpoint import open_checkpoint


def save_random_bridge(folder: Path, pair: Path, *, rank: int = 6, **changes: Any) -> Projectors:
    """Writes a bridge of all student layers, mapped by depth; ``changes`` are to its manifest."""
    student, teacher = (open_checkpoint(pair / n).architecture for n in ("student", "teacher"))
    layers = list(enumerate(proportional_layer_map(student.num_layers, teacher.num_layers)))
    generator = torch.Generator().manual_seed(5)
    wide = {t: torch.randn(teacher.hidden_size, rank, generator=generator) for _, t in layers}
    projectors = Projectors(
        student={s: torch.randn(rank, student.hidden_size, generator=generator) for s, _ in layers},
        teacher={t: torch.linalg.qr(one).Q.t().contiguous() for t, one in wide.items()},
        mean={t: torch.randn(teacher.hidden_size, generator=generator) for t in wide},
    )
    fields: dict[str, Any] = {
        "student": {"name": "student", "architecture": architecture_numbers(student)},
        "teacher": {"name": "teacher", "architecture": architecture_numbers(teacher)},
        "layer_pairs": layers,
        "positions": "all",
        "k": None,
        "alignment": "predictor",
        "last_layer": "post_norm",
        "rank": rank,
        "fit": {},
        "data": {},
        "cosine": {},
    }
    write_bridge(folder, projectors, Manifest(**fields | changes))
    return projectors
