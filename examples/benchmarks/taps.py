"""What the taps cost: the student's forward and backward pass with taps on all layers, and without.

    python examples/benchmarks/taps.py
    python examples/benchmarks/taps.py --layers 28 --hidden-size 384 --tokens 512 --repeats 7
    python examples/benchmarks/taps.py --hidden-size 1536 --tokens 8192 --dtype bf16

Without taps the same layers run forward and backward, on a loss that is zero. Both kinds of pass
take turns in one process; the table has the medians. Goal: at most 3% of the time, and no more
memory than the teacher's targets.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import measure, time_and_memory
from pair import NUM_SEQUENCES, Switch, make_run, micro_batches

from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, in this process."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    memory: dict[bool, list[int]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        config = make_run(
            Path(folder),
            layers=args.layers,
            hidden_size=args.hidden_size,
            vocab_size=512,
            tokens=args.tokens,
            params_dtype=args.dtype,
            overrides=args.overrides,
        )
        with parallel_run(config.parallel, seed=config.seed) as context:
            distiller = Distiller(make_plan(config, world_size=1), context)
            taps = Switch(distiller)
            group = micro_batches(distiller, args.tokens)
            rows = NUM_SEQUENCES * (args.tokens - 1)
            for repeat in range(args.repeats + 1):
                for with_taps in (False, True):
                    taps.turn(on=with_taps)
                    if with_taps:
                        distiller.teacher_pass(group)
                    distiller.state.clear_gradients()
                    one_seconds, one_memory = measure(
                        lambda: distiller.student_pass(group, is_last=True)
                    )
                    distiller.end_step()
                    if repeat > 0:  # the first pass of each kind warms up
                        seconds[with_taps].append(one_seconds)
                        memory[with_taps].append(one_memory)
            targets = rows * distiller.plan.layout.target_bytes_per_row
    return {
        "seconds": [statistics.median(seconds[kind]) for kind in (False, True)],
        "bytes": [statistics.median(memory[kind]) for kind in (False, True)],
        "bytes_of_targets": targets,
    }


def main() -> None:
    """Measures time and memory in a process each, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=512, help="of each of the four sequences")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="settings, as in taps.compile=true")
    args = parser.parse_intermixed_args()
    if args.in_this_process:
        print(json.dumps(run(args)))
        return
    arguments = [*sys.argv[1:], "--in-this-process"]
    timed, weighed = time_and_memory(__file__, arguments, threads=args.threads)
    seconds, targets = timed["seconds"], weighed["bytes_of_targets"]
    without, with_taps = weighed["bytes"]
    with_taps += targets  # they are there before the pass begins
    print(f"4 sequences of {args.tokens} tokens, {args.layers} layers, d = {args.hidden_size}")
    print(f"{'':22}{'without taps':>16}{'with taps':>16}")
    print(f"{'seconds':22}{seconds[0]:16.3f}{seconds[1]:16.3f}")
    print(f"{'MB at the peak':22}{without / 1e6:16.1f}{with_taps / 1e6:16.1f}")
    print(f"time: {100 * (seconds[1] / seconds[0] - 1):+.1f}% (goal: at most +3%)")
    print(
        f"memory: {(with_taps - without) / targets:+.2f} times the targets' {targets / 1e6:.1f} MB "
        "(goal: at most 1)"
    )


if __name__ == "__main__":
    main()
