"""All commands under one name: ``megatron-oprd COMMAND ...``.

On several processes: ``torchrun --nproc-per-node N -m megatron_oprd train --config run.yaml``.
"""

import argparse
import runpy
import sys

# The module that each command runs, as ``python -m`` does, and what it does.
COMMANDS = {
    "train": ("megatron_oprd.train", "distils a student"),
    "plan": ("megatron_oprd.plan", "says what a run needs: memory, messages, time"),
    "evaluate": ("megatron_oprd.evaluate", "measures models on benchmarks or against a teacher"),
    "build-bridge": ("megatron_oprd.build_bridge", "fits projectors between models' widths"),
    "report": ("megatron_oprd.report", "draws a run's curves"),
    "selftest": ("megatron_oprd.selftest", "tries a new machine"),
    "hf-to-megatron": ("checkpoint_tools.hf_to_megatron", "converts a checkpoint"),
    "megatron-to-hf": ("checkpoint_tools.megatron_to_hf", "converts it back"),
    "gguf-to-hf": ("checkpoint_tools.gguf_to_hf", "converts a GGUF file"),
    "inspect": ("checkpoint_tools.inspect", "lists a checkpoint's tensors"),
    "verify": ("checkpoint_tools.verify", "compares two checkpoints"),
    "prune-depth": ("checkpoint_tools.prune_depth", "makes a student of fewer layers"),
}


def main() -> None:
    """Runs a command with the arguments behind it; the command exits by itself."""
    parser = argparse.ArgumentParser(
        prog="megatron-oprd",
        description="On-policy distillation by hidden states.",
        epilog="\n".join(f"  {name:<16}{what}" for name, (_, what) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    # Its own arguments, --help included, are the command's.
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv = sys.argv[1:]
    runpy.run_module(COMMANDS[command][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
