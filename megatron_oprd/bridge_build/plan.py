"""What building a bridge will do, worked out and checked before any weight is read."""

from pathlib import Path

from megatron_oprd.bridge.format import check_bridge_place
from megatron_oprd.bridge_build.config import BuildBridgeConfig
from megatron_oprd.errors import UserError
from megatron_oprd.models.build import Extent
from megatron_oprd.training.plan import RunPlan, plan_models


def plan_build(config: BuildBridgeConfig, *, world_size: int) -> RunPlan:
    """Places both models, as a training run with the same settings does.

    Raises:
        UserError: A model, a tokenizer or the prompts cannot be used, the settings do not fit the
            models or the number of processes, or ``output_dir`` is taken.
    """
    check_bridge_place(Path(config.output_dir))
    plan = plan_models(config.as_run(), world_size=world_size, builds_bridge=True)
    narrower = min(plan.student.architecture.hidden_size, plan.teacher.architecture.hidden_size)
    if max(config.fit.ranks) > narrower:
        raise UserError(
            f"fit.ranks = {config.fit.ranks}: at most {narrower}, the width of the narrower model"
        )
    return plan


def frozen_student_extent(plan: RunPlan) -> Extent:
    """How much of the student is built: up to its deepest tap, on the stages of training."""
    left = plan.num_running_layers
    layers = []
    for count in plan.student.extent.layers_per_stage:
        layers.append(min(count, left))
        left -= layers[-1]
    return Extent(layers_per_stage=tuple(layers), final_norm=plan.trains_final_norm, lm_head=False)
