"""Trains: ``torchrun --nproc-per-node N -m megatron_oprd.train --config run.yaml [key=value ...]``.

``--dry-run`` checks the configuration against the models, reading no weight, and prints what the
run would do; it needs no torchrun.
"""

import argparse
import os
from pathlib import Path

import psutil

from megatron_oprd.config.load import load_config
from megatron_oprd.errors import EXIT_STOPPED, UserError, run_entry_point, say
from megatron_oprd.parallel.context import fewest_ranks, parallel_run
from megatron_oprd.planning.estimate import check_host_memory
from megatron_oprd.training.loop import train
from megatron_oprd.training.plan import describe, make_plan
from megatron_oprd.training.resume import checkpoint_to_resume
from megatron_oprd.training.rollouts import (
    check_rollout_server,
    check_server_to_start,
    describe_prompts,
)


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_oprd.train", description=(__doc__ or "").split("``")[0]
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument(
        "--dry-run", action="store_true", help="check and print the plan, then stop"
    )
    parser.add_argument("overrides", nargs="*", help="settings, as in optimizer.lr=1e-5")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    parallel = config.parallel
    started = fewest_ranks(parallel) if arguments.dry_run else 1
    num_ranks = int(os.environ.get("WORLD_SIZE", started))
    plan = make_plan(config, world_size=num_ranks)
    checkpoint_to_resume(plan)
    first = os.environ.get("RANK", "0") == "0"
    if first:  # other hosts may see it under another address; an engine that cannot start says so
        check_rollout_server(plan)
    ranks_on_host = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        check_host_memory(
            config,
            num_ranks=num_ranks,
            ranks_on_host=ranks_on_host,
            available_bytes=psutil.virtual_memory().available,
        )
    except UserError as error:
        if not arguments.dry_run:
            raise
        say(f"warning: on this machine, {error}")  # the run may be for another one
    if arguments.dry_run:
        if first:
            print(describe(plan))
            print(describe_prompts(plan))
        return 0
    if first:
        check_server_to_start(plan, ranks_on_host=ranks_on_host)
    with parallel_run(parallel, seed=config.seed) as context:
        student = train(plan, context)
    if student is None:
        return EXIT_STOPPED
    if first:
        print(f"the distilled student: {student}")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
