"""Trains: ``torchrun --nproc-per-node N -m megatron_oprd.train --config run.yaml [key=value ...]``.

``--dry-run`` checks the configuration against the models without reading weights, and prints the
plan of the run; it needs no torchrun.
"""

import argparse
from pathlib import Path

from megatron_oprd.config.load import load_config
from megatron_oprd.errors import EXIT_STOPPED, run_entry_point
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.preflight import prepare
from megatron_oprd.training.describe import describe
from megatron_oprd.training.loop import train
from megatron_oprd.training.prompts import describe_prompts


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
    plan, launch = prepare(config, dry_run=arguments.dry_run)
    if arguments.dry_run:
        if launch.is_first:
            print(describe(plan))
            print(describe_prompts(plan))
        return 0
    with parallel_run(config.parallel, seed=config.seed) as context:
        student = train(plan, context)
    if student is None:
        return EXIT_STOPPED
    if launch.is_first:
        print(f"the distilled student: {student}")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
