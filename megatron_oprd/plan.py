"""Plans a run: ``python -m megatron_oprd.plan --config run.yaml [--gpus 64] [key=value ...]``.

Computes the memory, communication and work of each rank in each phase, and whether the run fits,
from configurations alone. A model's folder needs only its config.json; tokenizers, prompts and
weights are not read, and no process group is started.
"""

import argparse
import math
from dataclasses import fields
from pathlib import Path

from megatron_oprd.config.load import load_config
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.console import make_console
from megatron_oprd.errors import UserError, run_entry_point
from megatron_oprd.parallel.context import fewest_ranks
from megatron_oprd.planning.activations import KERNELS
from megatron_oprd.planning.estimate import estimate_memory, estimate_work, read_models
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.ladder import check_fits
from megatron_oprd.planning.recommend import Lengths, recommend
from megatron_oprd.planning.recommended import print_recommended
from megatron_oprd.planning.report import as_json, print_plan, write_json
from megatron_oprd.planning.staleness import other_policy


def main() -> int:
    """Runs the command line; returns the exit code."""
    arguments = _parse()
    config = load_config(arguments.config, arguments.overrides)
    _check(arguments, config)
    models = read_models(config)
    num_gpus = arguments.gpus or fewest_ranks(config.parallel)
    hardware = Hardware(**{name: getattr(arguments, name) for name in _HARDWARE})
    kernels = KERNELS[arguments.layers]
    prompt = arguments.prompt_tokens or config.data.max_prompt_tokens
    response = arguments.response_tokens or config.rollout.max_new_tokens
    if arguments.recommend:
        lengths = Lengths(prompt=prompt, response=response)
        found = recommend(config, models, kernels, hardware, num_gpus=num_gpus, lengths=lengths)
        other = other_policy(
            config, models, kernels, hardware, found, num_gpus=num_gpus, lengths=lengths
        )
        print_recommended(make_console(highlight=False), found, other, hardware, num_gpus=num_gpus)
        return 0
    memory = estimate_memory(
        config, models, kernels, num_gpus=num_gpus, memory_gb=hardware.memory_gb
    )
    work = estimate_work(memory.layouts, hardware, prompt_tokens=prompt, response_tokens=response)
    if arguments.json is not None:
        write_json(arguments.json, as_json(memory, work, hardware))
    print_plan(make_console(highlight=False), memory, work, hardware)
    check_fits(memory, models, kernels, hardware, num_gpus=num_gpus)
    return 0


# Not in config/: options of this command, and their relation to the run's settings.
def _check(arguments: argparse.Namespace, config: RunConfig) -> None:
    """Rejects impossible numbers."""
    flags = {name: flag for name, (flag, _, _) in _HARDWARE.items()}
    for option in ("gpus", *_HARDWARE, "prompt_tokens", "response_tokens"):
        value, flag = getattr(arguments, option), flags.get(option, _flag(option))
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag} {value} is out of range; it has to be above 0, and finite")
    if arguments.recommend and arguments.json is not None:
        raise UserError(
            f"--json {arguments.json} has no effect with --recommend; give the settings of a "
            "recommended layout, and --json without --recommend"
        )
    if arguments.mfu > 1:
        raise UserError(
            f"--mfu {arguments.mfu} is out of range; it is a share of the peak, at most 1"
        )
    for option, setting, most in (
        ("prompt_tokens", "data.max_prompt_tokens", config.data.max_prompt_tokens),
        ("response_tokens", "rollout.max_new_tokens", config.rollout.max_new_tokens),
    ):
        value = getattr(arguments, option)
        if value is not None and value > most:
            raise UserError(
                f"{_flag(option)} {value} is more than {setting} = {most}; give at most that"
            )


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


# The fields of `Hardware`: option, unit, meaning.
_HARDWARE = {
    "memory_gb": (
        "--gpu-memory",
        "GB",
        "memory of a GPU that the run may take, in 10^9 bytes (what such a GPU has beyond its "
        "name, about 7%%, is left to CUDA, NCCL and the allocator)",
    ),
    "tflops": ("--gpu-tflops", "TFLOP/S", "peak of bf16 matrix products"),
    "bandwidth": ("--gpu-bandwidth", "GB/S", "memory bandwidth"),
    "mfu": (
        "--mfu",
        "SHARE",
        "share of the peak that is reached while a GPU computes, without messages and bubble",
    ),
    "gpus_per_node": ("--gpus-per-node", "NUMBER", "GPUs that are linked to each other directly"),
    "host_memory_gb": (
        "--host-memory",
        "GB",
        "a node's memory for what is offloaded and for checkpoints, in 10^9 bytes; only "
        "--recommend compares it",
    ),
    "node_bandwidth": (
        "--node-bandwidth",
        "GB/S",
        "what NCCL reaches between a GPU and the others of its node, one way",
    ),
    "network_bandwidth": (
        "--network-bandwidth",
        "GB/S",
        "what it reaches between a GPU and other nodes over the GPU's own network card, one way",
    ),
    "host_bandwidth": (
        "--host-bandwidth",
        "GB/S",
        "copies between a GPU and its host's memory, one way",
    ),
    "disk_bandwidth": ("--disk-bandwidth", "GB/S", "a node's writing of checkpoints"),
}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_oprd.plan",
        description="Says what a run needs and whether it fits, from configurations alone. "
        "Defaults are those of an H100 with 80 GB.",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--gpus", type=int, help="GPUs of the run; default: one replica")
    for field in fields(Hardware):
        option, unit, meaning = _HARDWARE[field.name]
        parser.add_argument(
            option,
            dest=field.name,
            type=int if field.name == "gpus_per_node" else float,
            default=field.default,
            metavar=unit,
            help=f"{meaning}; default: %(default)g",
        )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        help="typical prompt, for times and messages; default: data.max_prompt_tokens",
    )
    parser.add_argument(
        "--response-tokens",
        type=int,
        help="typical response, likewise; default: rollout.max_new_tokens",
    )
    parser.add_argument(
        "--layers",
        choices=list(KERNELS),
        default="transformer_engine",
        help="implementation of the layers: with Transformer Engine, without it (local), or "
        "without it on a CPU; default: %(default)s",
    )
    parser.add_argument(
        "--recommend",
        action="store_true",
        help="rank the layouts that fit by the time of a step, and print the first five, and "
        "what other staleness of the rollouts would gain",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write it all as JSON")
    parser.add_argument("overrides", nargs="*", help="settings, as in optimizer.lr=1e-5")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run_entry_point(main)
