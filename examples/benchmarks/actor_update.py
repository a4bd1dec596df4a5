"""The student's update: OPRD against losses on the next-token distribution.

    python examples/benchmarks/actor_update.py
    python examples/benchmarks/actor_update.py --hidden-size 192 --tokens 512 --repeats 5
    python examples/benchmarks/actor_update.py --hidden-size 1536 --tokens 8192 --dtype bf16

At the paper's proportions: 28 layers, V/d = 99, so that the LM head has 15% of the forward pass's
FLOPs as in Qwen2.5-1.5B. A kind of update is the student's forward and backward pass and the
optimizer's step, after whatever its targets need:

- oprd: hidden states of all layers, as the project trains;
- cross_entropy: the LM head and the loss of the response tokens;
- top_16: the LM head, the student's 16 most likely tokens, and the reverse KL of both models
  renormalised on them, the teacher's log-probabilities given;
- top_16_chunked: the project's own ``output_loss.kind = top_k`` with 16 tokens, which computes the
  teacher's logits as well, but both models' for 512 positions at a time.

cross_entropy and top_16 are plain PyTorch on the logits of a micro-batch, as the method's reference
implementation has them. Each kind runs in a process of its
own, with activations recomputed, as that implementation does by default. Goals: oprd at least 1.44
times as fast as top_16, and at most 0.46 of its transient memory.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import measure, time_and_memory
from megatron.core.pipeline_parallel import get_forward_backward_func
from pair import NUM_SEQUENCES, Switch, make_run, micro_batches
from torch import Tensor

from megatron_oprd.data.batching import MicroBatch
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller

KINDS = ("oprd", "cross_entropy", "top_16", "top_16_chunked")
TOP_K = 16
FULL_RECOMPUTE = (
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=uniform",
    "recompute.recompute_num_layers=1",
)

CHUNKED = ("output_loss.kind=top_k", f"output_loss.k={TOP_K}", "taps.layers=none")


def cross_entropy(logits: Tensor, micro_batch: MicroBatch) -> Tensor:
    """The negative log-likelihood of the tokens that follow, logits [t, V], summed."""
    return F.cross_entropy(logits[:-1].float(), micro_batch.input.tokens[0, 1:], reduction="sum")


def reverse_kl_on_top_k(logits: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Reverse KL on the student's top-k tokens, renormalised; logits [t, V], summed."""
    log_p, _ = F.log_softmax(logits.float(), dim=-1).topk(TOP_K)
    log_p = log_p.log_softmax(dim=-1)
    log_q = torch.full_like(log_p, 1 / TOP_K).log()
    return (log_p.exp() * (log_p - log_q)).sum()


def output_space_pass(
    distiller: Distiller,
    group: list[MicroBatch],
    loss_of: Callable[[Tensor, MicroBatch], Tensor],
) -> None:
    """The student's forward and backward pass with a loss on its logits."""

    def forward_step(data: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
        micro_batch = next(data)
        hidden = model(micro_batch.input.tokens, micro_batch.input.position_ids, None)

        def loss(hidden: Tensor) -> tuple[Tensor, dict]:
            # [s, 1, h] --> [s, V]
            logits = hidden.squeeze(1) @ model.module.embedding.word_embeddings.weight.t()
            return loss_of(logits, micro_batch), {}

        return hidden, loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(group),
        model=distiller.state.chunks,
        num_microbatches=len(group),
        seq_length=group[0].input.tokens.shape[1],
        micro_batch_size=1,
        forward_only=False,
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one kind of update in this process."""
    found = []
    config = make_run(
        args.models,
        layers=28,
        hidden_size=args.hidden_size,
        vocab_size=99 * args.hidden_size,
        tokens=args.tokens,
        params_dtype=args.dtype,
        overrides=[
            *(FULL_RECOMPUTE if args.recompute == "full" else ()),
            *(CHUNKED if args.kind == "top_16_chunked" else ()),
            *args.overrides,
        ],
    )
    with parallel_run(config.parallel, seed=config.seed) as context:
        distiller = Distiller(make_plan(config, world_size=1), context)
        group = micro_batches(distiller, args.tokens)
        Switch(distiller).turn(on=args.kind == "oprd")

        is_ours = args.kind in ("oprd", "top_16_chunked")

        def update() -> None:
            if is_ours:
                distiller.student_pass(group, is_last=True)
                distiller.end_step()
            else:
                loss = cross_entropy if args.kind == "cross_entropy" else reverse_kl_on_top_k
                output_space_pass(distiller, group, loss)
            distiller.update(loss_is_finite=True)

        # They are there before the update begins.
        plan = distiller.plan
        bytes_per_row = plan.layout.target_bytes_per_row + plan.layout.output_target_bytes_per_row
        targets = NUM_SEQUENCES * (args.tokens - 1) * bytes_per_row if is_ours else 0
        for _ in range(args.repeats + 1):
            if is_ours:
                distiller.teacher_pass(group)
            distiller.state.clear_gradients()
            seconds, peak = measure(update)
            found.append((seconds, peak + targets))
    return {  # the first update warms up
        "seconds": statistics.median(seconds for seconds, _ in found[1:]),
        "bytes": statistics.median(peak for _, peak in found[1:]),
    }


def main() -> None:
    """Measures each kind in processes of its own, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden-size", type=int, default=192, help="a multiple of 24")
    parser.add_argument("--tokens", type=int, default=512, help="of each of the four sequences")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--recompute", choices=("full", "none"), default="full", help="of activations"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="settings, as in taps.compile=true")
    args = parser.parse_intermixed_args()
    if args.kind:
        print(json.dumps(run(args)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as models:
        for kind in KINDS:
            arguments = [*sys.argv[1:], "--kind", kind, "--models", models]
            timed, weighed = time_and_memory(__file__, arguments, threads=args.threads)
            found[kind] = timed["seconds"], weighed["bytes"]
    print(f"4 sequences of {args.tokens} tokens, 28 layers, d = {args.hidden_size}, V = 99 d")
    print(f"{'':16}{'seconds':>10}{'MB transient':>16}{'time / oprd':>14}{'oprd / memory':>16}")
    seconds, size = found["oprd"]
    for kind, (of_kind, bytes_of_kind) in found.items():
        print(
            f"{kind:16}{of_kind:10.2f}{bytes_of_kind / 1e6:16.1f}{of_kind / seconds:14.2f}"
            f"{size / bytes_of_kind:16.2f}"
        )
    print("goals for top_16: 1.44 or more, 0.46 or less")


if __name__ == "__main__":
    main()
