"""Two training steps on fixed rollouts in one layout, compared with those of one rank."""

import random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.config.load import load_config
from megatron_oprd.config.schema import RunConfig, TeacherConfig
from megatron_oprd.errors import UserError
from megatron_oprd.models.fp8_transformer_engine import RECIPES, check_available
from megatron_oprd.parallel.context import ParallelContext, parallel_run
from megatron_oprd.rollout.engine import Rollout
from megatron_oprd.selftest.cases import CaseFailedError, CaseSkippedError, Place
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller
from megatron_oprd.weights.export import Exporter

# With a large epsilon, Adam's updates are linear in the gradients. With the usual one an element
# whose gradient is rounding alone moves by the whole learning rate.
LINEAR_UPDATES = ["optimizer.lr=0.1", "optimizer.adam_eps=1.0", "optimizer.lr_warmup_fraction=0"]


def run(arguments: dict[str, Any], place: Place) -> str:
    """Runs a case: {pair, overrides, saved_as, compared_with, tolerances}.

    ``saved_as`` is None or a name by which other cases are compared with this one;
    ``compared_with`` is None or such a name. ``tolerances`` are of what `_compare` compares.
    """
    config = load_config(
        place.models / arguments["pair"] / "run.yaml",
        [*LINEAR_UPDATES, *arguments["overrides"]],
    )
    with parallel_run(config.parallel, seed=config.seed) as context:
        _check_recipe(config.teacher, context)
        found = _two_steps(config, context)
        is_first = context.rank == 0
    if not is_first:
        return ""
    if arguments["saved_as"] is not None:
        torch.save(found, place.folder / f"{arguments['saved_as']}.pt")
    if arguments["compared_with"] is None:
        return f"loss {float(found['loss'].sum()):.5f}"
    expected = place.folder / f"{arguments['compared_with']}.pt"
    if not expected.exists():
        raise CaseSkippedError(f"{arguments['compared_with']} on one rank has failed")
    return _compare(found, torch.load(expected), arguments["tolerances"])


def _check_recipe(teacher: TeacherConfig, context: ParallelContext) -> None:
    """Raises `CaseSkippedError` if this machine does not have the FP8 recipe of the teacher."""
    if teacher.precision == "fp8" and teacher.fp8_recipe in RECIPES:
        try:
            check_available(teacher.fp8_recipe, transformer_engine=context.transformer_engine)
        except UserError as reason:
            raise CaseSkippedError(str(reason)) from reason


def rollouts(count: int = 8, *, longest: int = 24, seed: int = 0) -> list[Rollout]:
    """Prompts and responses of different lengths, always the same; tokens of the tiny models."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, 256) for _ in range(draw.randint(least, most)))

    return [
        Rollout(
            prompt_index=number,
            sample_index=0,
            prompt_ids=tokens(3, 8),
            response_ids=tokens(1, longest),
            finished=False,
        )
        for number in range(count)
    ]


def _two_steps(config: RunConfig, context: ParallelContext) -> dict[str, Any]:
    """Losses, gradients and updates; the same on every rank, gradients if they are whole."""
    distiller = Distiller(make_plan(config, world_size=dist.get_world_size()), context)
    modules = distiller.state.modules
    exporter = Exporter(modules, distiller.plan.layout.student.table, context=context)
    before = _on_host(exporter.stream(dtype=torch.float32))
    fixed = rollouts()
    first = distiller.compute_gradients(distiller.micro_batches(fixed).groups)
    gradients = _on_host(exporter.stream(gradient, dtype=torch.float32))
    norm, _ = distiller.update(loss_is_finite=True)
    second = distiller.step(fixed, 1)
    distiller.state.gather_parameters()
    after = _on_host(exporter.stream(dtype=torch.float32))
    return {
        "loss": first.loss_per_layer.cpu(),
        "loss of the second step": torch.tensor(second.loss_per_layer),
        "gradient norm": torch.tensor([norm, second.grad_norm]),
        # The distributed optimizer leaves each replica and context rank a part of the gradients.
        "gradients": gradients if context.dp_size * context.cp_size == 1 else None,
        "update": {name: after[name] - before[name] for name in before},
    }


def gradient(parameter: torch.nn.Parameter) -> Tensor:
    """The reduced gradient of a parameter, zero for a frozen one."""
    main_grad = getattr(parameter, "main_grad", None)
    return torch.zeros_like(parameter.data) if main_grad is None else main_grad


def _on_host(stream: Any) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in stream}


def _compare(found: dict[str, Any], expected: dict[str, Any], tolerances: dict[str, float]) -> str:
    """The largest differences, relative to the values' size.

    Raises:
        CaseFailedError: One is larger than its tolerance, or not a number.
    """
    parts, wrong = [], []
    for what, tolerance in tolerances.items():
        ours, theirs = found[what], expected[what]
        if ours is None:
            continue
        pairs = (
            {what: (ours, theirs)}
            if isinstance(ours, Tensor)
            else {name: (ours[name], theirs[name]) for name in theirs}
        )
        # Of the largest tensor of its kind: one of which nothing but rounding is left has no size.
        size = max(float(one.double().norm()) for _, one in pairs.values())
        differences = {
            name: float((one.double() - other.double()).norm())
            / max(float(other.double().norm()), 1e-3 * size)
            for name, (one, other) in pairs.items()
        }
        name = max(
            differences, key=lambda key: (differences[key] != differences[key], differences[key])
        )
        parts.append(f"{what} {differences[name]:.0e}")
        if not differences[name] <= tolerance:
            of = "" if name == what else f" of {name}"
            wrong.append(
                f"{what}{of} differs by {differences[name]:.1e} from one rank's; at most "
                f"{tolerance:.0e} is rounding"
            )
    if wrong:
        raise CaseFailedError("; ".join(wrong))
    return ", ".join(parts)
