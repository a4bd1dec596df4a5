"""Two steps; rank 0 writes what ran, what trains, and the student before and after."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller
from megatron_oprd.weights.export import Exporter
from megatron_oprd.weights.megatron_keys import named_parameters
from tests.helpers.pairs import as_rollouts, config_of, fixed_rollouts


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, pair, overrides}."""
    config = config_of(Path(case["pair"]), case["overrides"])
    with parallel_run(config.parallel, seed=config.seed) as context:
        plan = make_plan(config, world_size=dist.get_world_size())
        distiller = Distiller(plan, context)
        models = {"student": distiller.state.modules, "teacher": distiller.teachers[0].chunks}
        ran: dict[str, set[str]] = {name: set() for name in models}
        for name, chunks in models.items():
            _record_what_runs(chunks, ran[name])
        exporter = Exporter(distiller.state.modules, plan.layout.student.table, context=context)
        before = {name: tensor.clone() for name, tensor in exporter.stream() if tensor is not None}
        steps = [distiller.step(as_rollouts(*fixed_rollouts()), number) for number in range(2)]
        after = dict(exporter.stream())
        parameters = {
            model: {
                name: {
                    "requires_grad": parameter.requires_grad,
                    "has_gradient": hasattr(parameter, "main_grad") or parameter.grad is not None,
                }
                for name, parameter in named_parameters(chunks).items()
            }
            for model, chunks in models.items()
        }
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, (ran, parameters))
        if context.rank == 0:
            torch.save(
                {
                    "loss": torch.tensor([step.loss_per_layer for step in steps]),
                    "cosine": torch.tensor([step.cosine_per_layer for step in steps]),
                    "grad_norm": torch.tensor([step.grad_norm for step in steps]),
                    "ran": {
                        model: set().union(*(of_rank[0][model] for of_rank in of_ranks))
                        for model in models
                    },
                    "parameters": {
                        model: {
                            name: facts
                            for of_rank in of_ranks
                            for name, facts in of_rank[1][model].items()
                        }
                        for model in models
                    },
                    "before": before,
                    "after": after,
                },
                directory / f"{case['name']}.pt",
            )


def _record_what_runs(chunks: Sequence[GPTModel], ran: set[str]) -> None:
    """Adds a module's name to ``ran`` whenever its forward pass runs."""

    def record(name: str, *_: Any) -> None:
        ran.add(name)

    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for name, module in layer.named_children():
                module.register_forward_hook(partial(record, f"{layer.layer_number - 1}.{name}"))
        if hasattr(chunk, "output_layer"):
            chunk.output_layer.register_forward_hook(partial(record, "output_layer"))
