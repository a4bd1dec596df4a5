"""Measures the network between the ranks: an all-reduce over all of them, and within each machine.

    torchrun --nnodes 2 ... -m examples.benchmarks.all_reduce --megabytes 64 512

Bus bandwidth is 2 (n - 1) / n times size over time: what each rank's link carries, whatever n is.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist


def seconds(tensor: torch.Tensor, group: dist.ProcessGroup | None, repeats: int) -> float:
    """Mean time of an all-reduce of ``tensor`` over ``group``, after one that is not counted."""
    dist.all_reduce(tensor, group=group)
    _finish(tensor)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor, group=group)
    _finish(tensor)
    return (time.perf_counter() - start) / repeats


def _finish(tensor: torch.Tensor) -> None:
    # NCCL's calls return before the work is done.
    if tensor.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    """Prints a line for each size and group."""
    parser = argparse.ArgumentParser(description="Bandwidth of all-reduces between the ranks")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    world, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    of_machine, _ = dist.new_subgroups(local)
    for megabytes in arguments.megabytes:
        tensor = torch.zeros(megabytes * 10**6 // 2, dtype=torch.bfloat16)
        tensor = tensor.cuda() if on_gpu else tensor
        for name, group, n in (("all ranks", None, world), ("a machine", of_machine, local)):
            taken = seconds(tensor, group, arguments.repeats)
            bandwidth = 2 * (n - 1) / n * megabytes / 1e3 / taken
            if dist.get_rank() == 0:
                print(
                    f"{name}: {n} ranks, {megabytes} MB, {taken * 1e3:.2f} ms, "
                    f"bus {bandwidth:.1f} GB/s"
                )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
