"""The run's two models, of which a plan knows no more than their configurations."""

from dataclasses import dataclass
from pathlib import Path

from megatron_oprd.bridge.open import open_bridge
from megatron_oprd.config import RunConfig
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.families import read_architecture
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.weights.hf_files import HFFolder
from megatron_oprd.weights.megatron_checkpoint import is_megatron


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a plan knows of both models.

    Attributes:
        student: The student's architecture.
        teacher: The teacher's.
        bridge_rank: Width of the states behind the run's bridge; None is no bridge.
    """

    student: Architecture
    teacher: Architecture
    bridge_rank: int | None = None


def read_models(config: RunConfig) -> Models:
    """Reads the models' configurations. A Hugging Face folder needs nothing but config.json.

    The bridge is not needed where ``bridge.rank`` is given.

    Raises:
        UserError: A folder has no configuration, or one that is not supported; or the bridge
            cannot be read.
    """
    bridge_rank = config.bridge.rank
    if config.bridge.path is not None and bridge_rank is None:
        bridge_rank = open_bridge(Path(config.bridge.path)).rank
    return Models(
        student=_read(config.model.student, config.model.student_hf_config),
        teacher=_read(config.model.teacher, config.model.teacher_hf_config),
        bridge_rank=bridge_rank,
    )


def _read(folder: str, hf_config: str | None) -> Architecture:
    if is_megatron(Path(folder)):
        own = None if hf_config is None else Path(hf_config)
        return open_checkpoint(Path(folder), hf_config=own).architecture
    if hf_config is not None:  # a plan needs no checkpoint
        return read_architecture(HFFolder(hf_config))
    return read_architecture(HFFolder(folder))
