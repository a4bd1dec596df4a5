"""Tries this installation on this machine or cluster, with tiny models, in minutes.

``python -m megatron_oprd.selftest`` takes every GPU of the machine, or one process on the CPU. On
several machines: ``torchrun --nnodes N --nproc-per-node GPUS ... -m megatron_oprd.selftest``.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch

from megatron_oprd.errors import UserError, run_entry_point, say
from megatron_oprd.selftest.agents import Agents
from megatron_oprd.selftest.cases import Case, Result, Status, names_of
from megatron_oprd.selftest.models import save_pairs
from megatron_oprd.selftest.plan import cases, chosen
from megatron_oprd.selftest.report import print_table, write_json


def main() -> int:
    """Runs the command line; returns 0 if no case failed and each was run."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_oprd.selftest", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/selftest"), help="folder of results and logs"
    )
    parser.add_argument(
        "--ranks-per-gpu",
        type=int,
        default=1,
        metavar="N",
        help="ranks that share each GPU, over NCCL; without GPUs, processes on the CPU",
    )
    parser.add_argument(
        "--part", action="append", help="only parts whose name begins so; repeatable"
    )
    parser.add_argument("--minutes", type=float, default=10, help="what then has not run, is not")
    arguments = parser.parse_args()
    if arguments.ranks_per_gpu < 1:
        raise UserError(f"--ranks-per-gpu {arguments.ranks_per_gpu} has to be 1 or more")
    agents = Agents(ranks_per_device=arguments.ranks_per_gpu)
    todo = every = cases(agents.num_ranks, has_gpu=torch.cuda.is_available())
    if arguments.part:
        todo = chosen(every, arguments.part)
    if not todo:
        parts = ", ".join(dict.fromkeys(case.part for case in every))
        raise UserError(f"--part {arguments.part[0]} is the beginning of none of: {parts}")
    with tempfile.TemporaryDirectory(prefix="selftest_") as folder:
        models = Path(folder)
        save_pairs(models)
        if not agents.is_first:
            agents.follow(models)
            agents.close()
            return 0
        return _run(agents, todo, models, arguments)


def _run(agents: Agents, todo: list[Case], models: Path, arguments: argparse.Namespace) -> int:
    """Runs the cases and shows the results; on the first agent."""
    start = time.monotonic()
    folder = (arguments.output / time.strftime("%Y%m%d-%H%M%S")).absolute()
    folder.mkdir(parents=True)
    results: list[Result] = []
    # Ranks start once for the cases of their number, those on one rank first: the others are
    # compared with them.
    in_order = sorted(todo, key=lambda case: case.num_ranks)
    for num_ranks, group in itertools.groupby(in_order, key=lambda case: case.num_ranks):
        listed = list(group)
        say(f"{len(listed)} cases on {num_ranks} ranks")
        results += agents.run(
            listed, models=models, folder=folder, end=start + 60 * arguments.minutes
        )
    agents.close()
    order = {(case.part, case.name): number for number, case in enumerate(todo)}
    results.sort(key=lambda one: order[one.part, one.name])
    seconds = time.monotonic() - start
    write_json(folder / "results.json", results, seconds=seconds)
    print_table(results)
    bad = names_of(results, Status.FAILED) + names_of(results, Status.NOT_RUN)
    passed = len(results) - len(bad)
    print(f"{passed} of {len(results)} cases passed or were skipped, in {seconds:.0f} s")
    print(f"results and logs: {folder}")
    if bad:
        print("failed or not run: " + "; ".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    run_entry_point(main)
