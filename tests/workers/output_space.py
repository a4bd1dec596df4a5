"""Output-space losses on logits whose columns are divided over the ranks."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_oprd.config.schema import OutputLossConfig, ParallelConfig
from megatron_oprd.distill.output_space import VocabularyShard, output_space_loss
from megatron_oprd.parallel.context import parallel_run
from tests.distill.test_output_space import PADDED, inputs


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {losses: [{name, settings, vocab_size, dtype}]}."""
    ranks = int(os.environ["WORLD_SIZE"])
    parallel = ParallelConfig(tensor_model_parallel_size=ranks)
    with parallel_run(parallel, seed=0) as context:
        for loss in case["losses"]:
            shard = VocabularyShard.of(
                vocab_size=loss["vocab_size"], padded_vocab_size=PADDED, group=context.groups.tp
            )
            student, teacher, labels = inputs()
            columns = slice(shard.start, shard.start + shard.size)
            dtype = getattr(torch, loss.get("dtype", "float64"))
            found = output_space_loss(
                student[:, columns].to(dtype),
                teacher[:, columns].to(dtype),
                labels % loss["vocab_size"],
                shard,
                OutputLossConfig(**loss["settings"]),
            )
            parts: list[Any] = [None] * ranks
            dist.all_gather_object(parts, found.gradient)
            if context.rank == 0:
                torch.save(
                    {"value": found.value, "gradient": torch.cat(parts, dim=1)},
                    directory / f"{loss['name']}.pt",
                )
