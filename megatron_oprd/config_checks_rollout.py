"""What is checked of the group ``rollout``, whichever engine there is."""

import math

from megatron_oprd.config import RolloutConfig, RunConfig
from megatron_oprd.errors import UserError


def check_rollout(config: RunConfig) -> None:
    """Refuses values that are wrong whatever the models are, and settings without effect.

    Raises:
        UserError: There is one.
    """
    rollout = config.rollout
    if "" in rollout.stop:
        raise UserError("rollout.stop has an empty text, which every response would end with")
    if rollout.one_step_off_policy and rollout.engine == "hf":
        raise UserError(
            "rollout.one_step_off_policy = true with rollout.engine = hf, which generates in the "
            "trainer's own process and so not beside an update; use rollout.engine = vllm, or "
            "one_step_off_policy = false"
        )
    if rollout.one_step_off_policy and config.checkpoint.save_interval == 1:
        raise UserError(
            "rollout.one_step_off_policy = true has no effect with checkpoint.save_interval = 1: "
            "the step after a checkpoint has rollouts of its own weights; save less often"
        )
    threshold = rollout.logprob_warning_threshold
    if not 0 < threshold < math.inf:
        raise UserError(
            f"rollout.logprob_warning_threshold = {threshold}: has to be above 0, and finite"
        )
    is_default = threshold == RolloutConfig().logprob_warning_threshold
    if rollout.logprob_check_interval is None and not is_default:
        raise UserError(
            f"rollout.logprob_warning_threshold = {threshold} has no effect without "
            "rollout.logprob_check_interval, the steps between two comparisons"
        )
