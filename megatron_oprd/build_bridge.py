"""Builds a bridge between two models of other width or depth (OPRD-Bridge, stages 0 and 1).

``torchrun --nproc-per-node N -m megatron_oprd.build_bridge --config bridge.yaml [key=value ...]``

The student answers prompts, and both models read the answers. The projectors are fitted at every
mapped pair of layers, and their cosine is measured on held-out answers. The folder is
``bridge.path`` of a training run.
"""

import argparse
import os
from pathlib import Path

from megatron_oprd.bridge_build.config import load_build_config
from megatron_oprd.bridge_build.models import plan_build
from megatron_oprd.bridge_build.report import cosine_table
from megatron_oprd.bridge_build.run import build_bridge
from megatron_oprd.config.advice import warnings_of
from megatron_oprd.console import make_console
from megatron_oprd.errors import run_entry_point, say
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.parallel.node import Node
from megatron_oprd.training.rollouts import check_rollout_server, check_server_to_start


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_oprd.build_bridge",
        description=(__doc__ or "").split("``")[0],
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the bridge")
    parser.add_argument("overrides", nargs="*", help="settings, as in fit.ranks=[4,8]")
    arguments = parser.parse_intermixed_args()
    config = load_build_config(arguments.config, arguments.overrides)
    for warning in warnings_of(config.taps):
        say(f"warning: {warning}")
    plan = plan_build(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    # On rank 0 only: other hosts may reach a server at another address.
    if os.environ.get("RANK", "0") == "0":
        check_rollout_server(plan)
    if (node := Node.of_environment()).is_first_rank:
        check_server_to_start(plan, node)
    with parallel_run(config.parallel, seed=config.seed) as context:
        manifest = build_bridge(config, plan, context)
        first = context.rank == 0
    if first:
        make_console(highlight=False).print(cosine_table(manifest))
        print(f"the bridge: {config.output_dir}")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
