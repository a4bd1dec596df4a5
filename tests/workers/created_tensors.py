"""One whole step under a dispatch mode; rank 0 writes the shapes of all tensors that were made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller
from tests.helpers.pairs import as_rollouts, config_of, fixed_rollouts

Made = set[tuple[str, tuple[int, ...]]]


class Recorder(TorchDispatchMode):
    """Records every tensor that an operation returns or updates, in forward, backward and update.

    Attributes:
        made: (operation, shape).
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: Made = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Fused updates return nothing: what they were given is what they write.
        for leaf in tree_leaves(args if result is None else result):
            if isinstance(leaf, Tensor):
                self.made.add((str(func), tuple(leaf.shape)))
        return result


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, pair, overrides, vocab_size, logits_of}."""
    config = config_of(Path(case["pair"]), case["overrides"])
    with parallel_run(config.parallel, seed=config.seed) as context:
        distiller = Distiller(make_plan(config, world_size=dist.get_world_size()), context)
        if case["logits_of"] is not None:
            _compute_logits(distiller, case["logits_of"])
        prompts, responses = fixed_rollouts(vocab_size=case["vocab_size"])
        recorder = Recorder()
        with recorder:
            distiller.step(as_rollouts(prompts, responses), 0)
        made: list[Made] = [set() for _ in range(dist.get_world_size())]
        dist.all_gather_object(made, recorder.made)
        if context.rank == 0:
            torch.save(set().union(*made), directory / f"{case['name']}.pt")


def _compute_logits(distiller: Distiller, whose: str) -> None:
    """Makes a model compute the logits of its last hidden state and drop them."""
    chunks = distiller.state.modules if whose == "student" else distiller.teachers[0].chunks
    embedding = chunks[0].embedding.word_embeddings.weight
    chunks[-1].decoder.final_layernorm.register_forward_hook(
        lambda _module, _inputs, hidden: (hidden.detach() @ embedding.detach().t(), hidden)[1]
    )
