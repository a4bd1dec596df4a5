"""Rollouts by transformers and by vLLM: tokens/s, and seconds of a weight sync.

    python examples/benchmarks/rollout.py --model .cache/smollm2/SmolLM2-135M-Instruct
    python examples/benchmarks/rollout.py --model DIR --batch 64 --tokens 256 --dtype bf16

Both engines get the same weights and generate as many tokens for the same prompts, in turns, in one
thread each unless OMP_NUM_THREADS says otherwise. A sync is compared with a copy of the same bytes
within this process's memory, the way there alone, and the whole, which includes what vLLM does with
weights that it has got; and with a sync that leaves out the second half of the layers, as if these
were frozen. Goal for the way there: at most 1.2 times the copy.
"""

import argparse
import os
import statistics
import time
from collections.abc import Collection
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.models.build import DTYPES
from megatron_oprd.rollout.engine import RolloutEngine, SamplingParams
from megatron_oprd.rollout.hf import HFEngine
from megatron_oprd.rollout.vllm.engine import VLLMEngine
from megatron_oprd.rollout.vllm.shared_memory import keep_freed_memory, map_memory, read
from megatron_oprd.rollout.vllm.transfers import open_engine_transfer
from megatron_oprd.weights.hf_files import HFCheckpoint

CPU = torch.device("cpu")


def receive(calls: Connection) -> None:
    """The other end of syncs, without an engine: takes the tensors, and does nothing with them."""
    keep_freed_memory()
    values = map_memory(*calls.recv())
    calls.send(None)
    while True:
        info = calls.recv()
        dtypes = [getattr(torch, name) for name in info["dtype_names"]]
        for _ in read(values[info["offset"] :], dtypes=dtypes, shapes=info["shapes"]):
            pass
        calls.send(None)


class WayThere:
    """Syncs to a process that is no engine; also the client of their transfer."""

    def __init__(self, dtype: torch.dtype, *, num_bytes: int, largest: int) -> None:
        self._calls, theirs = Pipe()
        get_context("spawn").Process(target=receive, args=(theirs,), daemon=True).start()
        self._transfer = open_engine_transfer(
            self, device=CPU, gpu_uuids=(), dtype=dtype, num_bytes=num_bytes, largest=largest
        )

    def sync(self, weights: dict[str, Tensor]) -> float:
        """Seconds until all weights are in the process's memory."""
        start = time.perf_counter()
        self._transfer.send_weights(weights.items())
        return time.perf_counter() - start

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Has the process map the memory."""
        self.update_weights((init_info["path"], init_info["num_bytes"]))

    def start_weight_update(self) -> None:
        """Nothing waits for weights."""

    def update_weights(self, update_info: Any) -> None:
        """Has the process take a chunk."""
        self._calls.send(update_info)
        self._calls.recv()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing is made of the weights."""


def copy(weights: dict[str, Tensor], target: Tensor) -> float:
    """Seconds of a copy of all weights to another place in memory."""
    start, used = time.perf_counter(), 0
    for tensor in weights.values():
        target[used : used + tensor.numel()].copy_(tensor.reshape(-1))
        used += tensor.numel()
    return time.perf_counter() - start


def sync(
    engine: RolloutEngine, weights: dict[str, Tensor], *, left_out: Collection[str] = ()
) -> float:
    """Seconds of a sync, of all weights but those left out."""
    start = time.perf_counter()
    sent = ((name, tensor) for name, tensor in weights.items() if name not in left_out)
    engine.load_weights(sent, left_out=left_out)
    return time.perf_counter() - start


def tokens_per_second(engine: RolloutEngine, batch: int, tokens: int) -> float:
    """Tokens/s of ``batch`` responses of ``tokens`` tokens to prompts of 32."""
    prompts = [
        Prompt(index=i, token_ids=tuple(100 + (7 * i + j) % 1000 for j in range(32)))
        for i in range(batch)
    ]
    sampling = SamplingParams(max_new_tokens=tokens, seed=0)
    start = time.perf_counter()
    rollouts = engine.generate(prompts, sampling)
    count = sum(len(rollout.response_ids) for rollout in rollouts)
    assert count == batch * tokens, count
    return count / (time.perf_counter() - start)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--batch", type=int, default=16, help="responses at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a response")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    checkpoint, dtype = HFCheckpoint(args.model), DTYPES[args.dtype]
    weights = {name: checkpoint.read(name).to(dtype) for name in checkpoint.names()}
    known_ids = range(checkpoint.config["vocab_size"])
    config = VLLMConfig(kv_cache_gb=2.0, enforce_eager=True)
    start = time.perf_counter()
    vllm = VLLMEngine(
        args.model,
        dtype=dtype,
        device=CPU,
        eos_token_ids=[],  # every response has all its tokens
        known_ids=known_ids,
        max_model_len=32 + args.tokens,
        config=config,
    )
    print(f"vLLM's start: {time.perf_counter() - start:.1f} s")
    hf = HFEngine(
        args.model, dtype=dtype, device=CPU, eos_token_ids=[], pad_token_id=0, known_ids=known_ids
    )
    half = checkpoint.config["num_hidden_layers"] // 2
    later = {f"model.layers.{half + i}." for i in range(half)}
    frozen = {name for name in weights if name.startswith(tuple(later))}
    total = sum(tensor.numel() for tensor in weights.values())
    target = torch.empty(total, dtype=dtype)
    largest = max(tensor.nbytes for tensor in weights.values())
    way_there = WayThere(dtype, num_bytes=config.chunk_bytes, largest=largest)
    measured: dict[str, list[float]] = {}
    for _ in range(args.repeats + 1):
        for name, figure in (
            ("copy, s", copy(weights, target)),
            ("way there, s", way_there.sync(weights)),
            ("sync hf, s", sync(hf, weights)),
            ("sync vllm, s", sync(vllm, weights)),
            ("half frozen, s", sync(vllm, weights, left_out=frozen)),
            ("hf, tokens/s", tokens_per_second(hf, args.batch, args.tokens)),
            ("vllm, tokens/s", tokens_per_second(vllm, args.batch, args.tokens)),
        ):
            measured.setdefault(name, []).append(figure)
    vllm.close()
    # The first round warms up.
    medians = {name: statistics.median(figures[1:]) for name, figures in measured.items()}
    stays = sum(weights[name].nbytes for name in frozen)
    print(
        f"{args.model.name}, {args.dtype}, {total * dtype.itemsize / 1e6:.0f} MB of weights, "
        f"{stays / 1e6:.0f} MB of them in the second half of the layers"
    )
    for name, figure in medians.items():
        print(f"{name:>16} {figure:8.3f}")
    ratio = medians["way there, s"] / medians["copy, s"]
    print(f"way there / copy: {ratio:.2f} (goal: at most 1.2)")


if __name__ == "__main__":
    main()
