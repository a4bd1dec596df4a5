"""Trains: ``torchrun --nproc-per-node N -m megatron_oprd.train --config run.yaml [key=value ...]``.

``--dry-run`` checks the configuration against the models, reading no weight, and prints what the
run would do; it needs no torchrun.
"""

import argparse
import os
from pathlib import Path

from megatron_oprd.config_file import load_config
from megatron_oprd.errors import run_entry_point
from megatron_oprd.parallel import parallel_run
from megatron_oprd.training.loop import train
from megatron_oprd.training.plan import describe, make_plan
from megatron_oprd.training.resume import checkpoint_to_resume


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
    one_replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    started = 1 if not arguments.dry_run else one_replica
    plan = make_plan(config, world_size=int(os.environ.get("WORLD_SIZE", started)))
    checkpoint_to_resume(plan)
    first = os.environ.get("RANK", "0") == "0"
    if arguments.dry_run:
        if first:
            print(describe(plan))
        return 0
    with parallel_run(parallel, seed=config.seed) as context:
        student = train(plan, context)
    if first:
        print(f"the distilled student: {student}")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
