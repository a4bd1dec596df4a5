"""A teacher with weights in FP8: what it computes, and what loading it allocates."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from checkpoint_tools.megatron_states import megatron_states
from megatron_oprd.config.schema import ModelConfig, ParallelConfig, TeacherConfig
from megatron_oprd.errors import UserError
from megatron_oprd.models import fp8_transformer_engine
from megatron_oprd.models.build import Extent
from megatron_oprd.models.families import mapping_table, read_architecture
from megatron_oprd.models.teacher import build_teacher
from megatron_oprd.parallel.context import parallel_run
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.megatron_keys import named_parameters
from tests.workers.memory import Allocations

VOCAB_SIZE = 128  # a multiple of every tensor-parallel size


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, folder, teacher, parallel, params_dtype, sequences, pretend}.

    With ``pretend`` the recipe passes for one that this machine has.
    """
    parallel = ParallelConfig(**case["parallel"])
    checkpoint = HFCheckpoint(case["folder"])
    architecture = read_architecture(checkpoint)
    stages = parallel.pipeline_model_parallel_size
    result: dict[str, Any] = {"error": None}
    with parallel_run(parallel, seed=0) as context:
        allocations = Allocations([])
        reads = []
        read_slice = HFCheckpoint.read_slice

        def reading(*args: Any) -> torch.Tensor:
            reads.append(args[1])
            return read_slice(*args)

        try:
            with ExitStack() as stack:
                stack.enter_context(allocations)
                stack.enter_context(patch.object(HFCheckpoint, "read_slice", reading))
                if case["pretend"]:
                    stack.enter_context(patch.object(fp8_transformer_engine, "check_available"))
                chunks = build_teacher(
                    architecture,
                    Extent(
                        layers_per_stage=(architecture.num_layers // stages,) * stages,
                        final_norm=True,
                        lm_head=False,
                    ),
                    mapping_table(architecture, padded_vocab_size=VOCAB_SIZE),
                    checkpoint,
                    teacher=TeacherConfig(**case["teacher"]),
                    model=ModelConfig(params_dtype=case["params_dtype"]),
                    parallel=parallel,
                    context=context,
                    padded_vocab_size=VOCAB_SIZE,
                    max_sequence_length=64,
                )
        except UserError as error:
            result["error"] = str(error)
        else:
            states = megatron_states(
                chunks, architecture, case["sequences"], parallel=parallel, context=context
            )
            if states is not None:
                result["states"] = [*states.layers, states.normed]
            result["parameters"] = {
                name: (str(parameter.dtype), parameter.numel())
                for name, parameter in named_parameters(chunks).items()
            }
            tensors = [t for chunk in chunks for t in (*chunk.parameters(), *chunk.buffers())]
            result["bytes"] = sum(tensor.nbytes for tensor in tensors)
            result["peak"] = allocations.peak
            result["requires_grad"] = any(tensor.requires_grad for tensor in tensors)
        result["reads"] = reads
        if context.rank == 0:
            torch.save(result, directory / f"{case['name']}.pt")
