"""The teacher's pass with larger micro-batches than the student's (teacher.max_tokens).

    python examples/benchmarks/teacher_tokens.py --model .cache/smollm2/SmolLM2-135M-Instruct
    python examples/benchmarks/teacher_tokens.py --model DIR --tokens 8192 --dtype bf16 \
        batch.sequence_packing=true

Student and teacher are the same model. A micro-batch of the student has as many tokens as the
longest of 16 sequences of different lengths; the teacher's are as large, and 4 and 16 times as
large. The three take turns in one process. The table has medians, and the operations of torch in a
pass, which on a GPU are about its launches.
"""

import argparse
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_oprd.config.load import load_config
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.data.batching import teacher_batches
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.rollout.engine import Rollout
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller

NUM_SEQUENCES = 16
TIMES = (1, 4, 16)


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def make_config(folder: Path, args: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
    """Writes a run of the model with itself to a folder, and returns its configuration."""
    prompt = args.tokens // 4
    (folder / "prompts.jsonl").write_text('{"prompt": "?"}\n')
    (folder / "run.yaml").write_text(
        f"""
output_dir: {folder / "run"}
model:
  student: {args.model.absolute()}
  teacher: {args.model.absolute()}
  params_dtype: {args.dtype}
data: {{prompts: [{folder / "prompts.jsonl"}], max_prompt_tokens: {prompt}}}
rollout:
  prompts_per_step: {NUM_SEQUENCES}
  samples_per_prompt: 1
  max_new_tokens: {args.tokens - prompt}
batch: {{max_tokens: {args.tokens}}}
"""
    )
    return load_config(folder / "run.yaml", [*overrides, *args.overrides])


def make_rollouts(tokens: int) -> list[Rollout]:
    """Random sequences of up to ``tokens`` tokens, always the same."""
    draw = random.Random(0)
    prompt = tokens // 4

    def some(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, 40) for _ in range(draw.randrange(low, high)))

    return [
        Rollout(
            prompt_index=number,
            sample_index=0,
            prompt_ids=some(prompt // 2, prompt),
            response_ids=some(prompt // 2, tokens - prompt),
            finished=False,
        )
        for number in range(NUM_SEQUENCES)
    ]


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=128, help="of the longest sequence")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("overrides", nargs="*", help="settings of the run")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        configs = {
            times: make_config(
                Path(folder), args, [f"teacher.max_tokens={times * args.tokens}"] * (times > 1)
            )
            for times in TIMES
        }
        with parallel_run(configs[1].parallel, seed=1) as context:
            distillers = {
                times: Distiller(make_plan(config, world_size=1), context)
                for times, config in configs.items()
            }
            print_table(distillers, make_rollouts(args.tokens), args.repeats)


def print_table(
    distillers: dict[int, Distiller], rollouts: Sequence[Rollout], repeats: int
) -> None:
    """Runs the passes in turn."""
    groups = {times: one.micro_batches(rollouts).groups for times, one in distillers.items()}
    seconds: dict[int, list[float]] = {times: [] for times in distillers}
    for repeat in range(repeats + 1):
        for times, one in distillers.items():
            found = one.compute_gradients(groups[times]).seconds_teacher
            if repeat > 0:  # the first pass of each warms up
                seconds[times].append(found)
    print(f"{sum(len(one.prompt_ids) + len(one.response_ids) for one in rollouts)} tokens")
    print(f"{'times the tokens':>16} {'micro-batches':>14} {'seconds':>9} {'operations':>11}")
    for times, one in distillers.items():
        (group,) = groups[times]
        with Operations() as operations, torch.no_grad():
            one.teacher_pass(group)
        print(
            f"{times:16} {len(teacher_batches(group)):14} "
            f"{statistics.median(seconds[times]):9.3f} {operations.count:11}"
        )


if __name__ == "__main__":
    main()
