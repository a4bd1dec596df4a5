"""All checks of a training run before it starts a process group or reads a weight."""

import os
from dataclasses import dataclass

import psutil
import torch

from megatron_oprd.config.advice import warnings_of
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.errors import UserError, say
from megatron_oprd.parallel.context import fewest_ranks
from megatron_oprd.parallel.node import Node
from megatron_oprd.planning.estimate import check_host_memory
from megatron_oprd.training.hub import check_hub
from megatron_oprd.training.plan import RunPlan, make_plan
from megatron_oprd.training.profile import check_profile
from megatron_oprd.training.resume import checkpoint_to_resume
from megatron_oprd.training.rollouts import check_rollout_server, check_server_to_start
from megatron_oprd.training.trackers import check_trackers


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The processes of a run, as started by the launcher."""

    num_ranks: int  # of the run
    node: Node  # of this process
    is_first: bool  # global rank 0

    @classmethod
    def of_environment(cls, *, without_launcher: int = 1) -> "Launch":
        """Reads torchrun's variables; without them there are ``without_launcher`` processes."""
        return cls(
            num_ranks=int(os.environ.get("WORLD_SIZE", without_launcher)),
            node=Node.of_environment(),
            is_first=os.environ.get("RANK", "0") == "0",
        )


def prepare(config: RunConfig, *, dry_run: bool) -> tuple[RunPlan, Launch]:
    """Plans a run and checks checkpoints, the rollout server and the host's memory.

    A ``dry_run`` may be meant for another machine: too little memory is a warning, and torchrun is
    not needed.

    Raises:
        UserError: Something is missing or does not fit.
    """
    fewest = fewest_ranks(config.parallel) if dry_run else 1
    launch = Launch.of_environment(without_launcher=fewest)
    for warning in warnings_of(config.taps):
        say(f"warning: {warning}")
    check_profile(config, num_ranks=launch.num_ranks, has_gpu=dry_run or torch.cuda.is_available())
    plan = make_plan(config, world_size=launch.num_ranks)
    checkpoint_to_resume(plan)
    if launch.is_first:
        check_trackers(config)
        check_hub(config)
        # Other hosts may reach a server at another address. An engine that cannot start reports it.
        check_rollout_server(plan)
    if launch.node.is_first_rank and not dry_run:
        check_server_to_start(plan, launch.node)
    try:
        check_host_memory(
            config,
            num_ranks=launch.num_ranks,
            ranks_on_host=launch.node.num_ranks,
            available_bytes=psutil.virtual_memory().available,
        )
    except UserError as error:
        if not dry_run:
            raise
        say(f"warning: on this machine, {error}")
    return plan, launch
