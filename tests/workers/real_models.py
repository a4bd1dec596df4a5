"""The parameters of every rank of a large layout, built one after another on the meta device.

torch's fake process group lets one process be any rank of any world; nothing is communicated.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_oprd.config.schema import ModelConfig, ParallelConfig, RecomputeConfig
from megatron_oprd.models.build import Extent, build_model, padded_vocab_size, transformer_config
from megatron_oprd.models.families import read_architecture
from megatron_oprd.parallel import cpu
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.weights.hf_files import HFFolder
from megatron_oprd.weights.megatron_keys import named_parameters

META = torch.device("meta")


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, folder, world_size, parallel, layers_per_stage, padded_vocab_size}.

    Saves a list with, for each rank, its stage, its place's fields, and its parameters' shapes.
    """
    cpu.enter()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: META  # where Megatron builds parameters
    ranks = [_rank(case, rank) for rank in range(case["world_size"])]
    torch.save(ranks, directory / f"{case['name']}.pt")


def _rank(case: dict[str, Any], rank: int) -> dict[str, Any]:
    parallel = ParallelConfig(**case["parallel"])
    world_size = case["world_size"]
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(0)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    context = ParallelContext(
        device=META,
        groups=groups,
        control=groups.tp,
        transformer_engine=False,
    )
    architecture = read_architecture(HFFolder(case["folder"]))
    extent = Extent(
        layers_per_stage=tuple(case["layers_per_stage"]),
        final_norm=True,
        lm_head=not architecture.tied,
    )
    config = transformer_config(
        architecture,
        extent,
        model=ModelConfig(params_dtype="bf16"),
        parallel=parallel,
        recompute=RecomputeConfig(),
        fused_kernels=False,
    )
    padded = padded_vocab_size(
        architecture, divisible_by=128, tensor_model_parallel_size=context.tp_size
    )
    assert padded == case["padded_vocab_size"]
    chunks = build_model(
        architecture,
        extent,
        config,
        context=context,
        padded_vocab_size=padded,
        max_sequence_length=architecture.max_position_embeddings,
    )
    parameters = named_parameters(chunks)
    assert {parameter.device for parameter in parameters.values()} == {META}
    found = {
        "stage": context.pp_rank,
        "place": dataclasses.asdict(context.place),
        "shapes": {name: tuple(parameter.shape) for name, parameter in parameters.items()},
    }
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return found
