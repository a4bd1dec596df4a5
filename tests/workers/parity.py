"""A loaded model's forward pass; rank 0 writes every layer's output, the logits and the export."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoint_tools.megatron_states import load_whole_model, megatron_states
from megatron_oprd.config.schema import ParallelConfig
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.weights.export import Exporter
from megatron_oprd.weights.megatron_keys import named_parameters
from tests.models.mutations import mutate

# Rows of the embedding become a multiple of this: for 97 tokens, 7 rows of padding.
VOCAB_MULTIPLE = 8


@torch.no_grad()
def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case.

    {name, folder, sequences, batches, parallel, mutation, max_sequence_length}
    """
    parallel = ParallelConfig(**case["parallel"])
    opened = open_checkpoint(Path(case["folder"]))
    architecture = opened.architecture
    with parallel_run(parallel, seed=0) as context:
        chunks, table = load_whole_model(
            architecture,
            opened.source,
            parallel=parallel,
            context=context,
            max_sequence_length=case["max_sequence_length"],
            make_vocab_size_divisible_by=VOCAB_MULTIPLE,
        )
        if case["mutation"] is not None:
            mutate(case["mutation"], architecture, named_parameters(chunks), chunks)
        states = megatron_states(
            chunks,
            architecture,
            case["sequences"],
            parallel=parallel,
            context=context,
            batches=case["batches"],
        )
        exported = dict(Exporter(chunks, table, context=context).stream())
        if context.rank == 0:
            assert states is not None
            source = _decoder(load_file(Path(case["folder"]) / "model.safetensors"))
            result = {
                "layers": states.layers,
                "normed": states.normed,
                "logits": states.logits,
                "exported": list(exported),
                "source": list(source),
                "changed": [
                    name
                    for name, tensor in exported.items()
                    if tensor is None or name not in source or not torch.equal(tensor, source[name])
                ],
            }
            torch.save(result, directory / f"{case['name']}.pt")


def _decoder(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's tensors, where the model has other parts as well."""
    inner = "language_model."
    if f"model.{inner}norm.weight" in stored:  # Qwen3.5's, whose head is outside
        beside = ("model.visual.", "mtp.")
        return {
            name.replace(inner, ""): one
            for name, one in stored.items()
            if not name.startswith(beside)
        }
    decoder = {name[len(inner) :]: one for name, one in stored.items() if name.startswith(inner)}
    return decoder or stored
