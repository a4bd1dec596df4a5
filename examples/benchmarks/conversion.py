"""Conversion in both directions against ``cp`` of the same files: GB/s and peak memory.

    python examples/benchmarks/conversion.py --folder /scratch/bench
    python examples/benchmarks/conversion.py --folder /scratch/bench --repeats 5 --gigabytes 4

Makes a Qwen2-shaped checkpoint of random bf16 weights, then lets ``cp``, Hugging Face -> Megatron
and Megatron -> Hugging Face take turns, each in a process of its own, the files warm in the page
cache. Like the tools, the ``cp`` that is compared with ends when its files are on the disk (fsync);
``cp`` alone, which leaves them in the page cache, is shown as well. Goals: at least 90% of cp, and
a peak of at most 1.5 GB over the interpreter with its imports.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import in_a_process, measure_on_host
from synthetic import save_random_model
from transformers import Qwen2Config

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from checkpoint_tools.megatron_to_hf import megatron_to_hf

# Two bytes a parameter: a layer of these sizes has 157 million of them, the embeddings 311 each.
_LAYER_BYTES, _EMBEDDING_BYTES = 2 * 157e6, 4 * 311e6


def make_source(folder: Path, gigabytes: float) -> Path:
    """Writes the checkpoint, unless it is there."""
    layers = max(1, round((gigabytes * 1e9 - _EMBEDDING_BYTES) / _LAYER_BYTES))
    source = folder / f"qwen2-{layers}-layers"
    if not source.is_dir():
        config = Qwen2Config(
            architectures=["Qwen2ForCausalLM"],
            vocab_size=151_936,
            hidden_size=2048,
            intermediate_size=22_528,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        )
        save_random_model(source, config, dtype=torch.bfloat16, seed=0)
    return source


def copy(source: Path, target: Path, *, sync: bool) -> None:
    """``cp -r``, and its files brought to the disk."""
    subprocess.run(["cp", "-r", source, target], check=True)
    if sync:
        for path in target.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def warm(folder: Path) -> int:
    """Reads every file into the page cache; the bytes of all."""
    buffer, total = bytearray(2**24), 0
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    total += count
    return total


def run_one(kind: str, folder: Path, source: Path) -> dict[str, float]:
    """One copy or conversion in this process."""
    targets = {"megatron": folder / "megatron", "hf": folder / "hf"}
    target = targets.get(kind, folder / "copy")
    shutil.rmtree(target, ignore_errors=True)
    work: dict[str, Callable[[], object]] = {
        "cp": lambda: copy(source, target, sync=False),
        "cp_sync": lambda: copy(source, target, sync=True),
        "megatron": lambda: hf_to_megatron(source, target, Settings()),
        "hf": lambda: megatron_to_hf(targets["megatron"], target),
    }
    size = warm(targets["megatron"] if kind == "hf" else source)
    os.sync()
    time.sleep(1)
    seconds, peak = measure_on_host(work[kind])
    if kind.startswith("cp"):
        shutil.rmtree(target)
    return {"seconds": seconds, "bytes": size, "peak": peak}


def main() -> None:
    """Lets the kinds take turns and prints the table of medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="needs four times the size")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source = make_source(args.folder, args.gigabytes)
    if args.kind:
        print(json.dumps(run_one(args.kind, args.folder, source)))
        return
    kinds = {"cp": "cp", "cp_sync": "cp, synced", "megatron": "HF -> Megatron", "hf": "and back"}
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(args.repeats):
        for kind in kinds:
            arguments = [*sys.argv[1:], "--kind", kind]
            threads = os.cpu_count() or 1
            found[kind].append(in_a_process(__file__, arguments, threads=threads))
    speed = {
        kind: statistics.median(run["bytes"] / run["seconds"] for run in runs) / 1e9
        for kind, runs in found.items()
    }
    print(f"{found['cp'][0]['bytes'] / 1e9:.2f} GB, medians of {args.repeats}")
    for kind, name in kinds.items():
        peak = max(run["peak"] for run in found[kind]) / 1e9
        line = f"{name:16}{speed[kind]:6.2f} GB/s"
        if not kind.startswith("cp"):
            line += (
                f"  {speed[kind] / speed['cp_sync']:6.0%} of cp synced"
                f"  {speed[kind] / speed['cp']:6.0%} of cp  peak +{peak:.2f} GB"
            )
        print(line)


if __name__ == "__main__":
    main()
