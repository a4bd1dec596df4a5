"""Megatron's own FP8 for a frozen model, with Transformer Engine's layers.

Weights and activations are rounded to FP8, with scales by the recipe. megatron-core enters
Transformer Engine's contexts itself, per layer, when building and when running. Built without grad,
a weight has neither a bf16 copy nor a copy for the backward pass.

Nothing here runs without a CUDA device: docs/gpu-checks.md lists what to try on one, and
tests/models/test_engine_sources.py compares every name with the released sources.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_oprd.config.schema import ParallelConfig, TeacherConfig
from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.weights.load import Store
from megatron_oprd.weights.mapping import Mapping, Piece
from megatron_oprd.weights.megatron_keys import is_linear_weight, named_parameters

# Function of transformer_engine.pytorch that reports whether this machine supports the recipe.
RECIPES = {
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}


def fp8_options(teacher: TeacherConfig) -> dict[str, Any]:
    """The fields of Megatron's configuration that make a model FP8."""
    at_start, at_end = teacher.num_layers_at_start_in_bf16, teacher.num_layers_at_end_in_bf16
    return {
        "fp8": "e4m3",
        "fp8_recipe": teacher.fp8_recipe,
        "fp8_param": True,
        "first_last_layers_bf16": at_start + at_end > 0,
        "num_layers_at_start_in_bf16": at_start,
        "num_layers_at_end_in_bf16": at_end,
    }


def check_available(recipe: str, *, transformer_engine: bool) -> None:
    """Raises `UserError` unless this machine supports ``recipe``, one of `RECIPES`.

    ``transformer_engine`` says that Transformer Engine is installed and has a CUDA device.
    """
    found, reason = False, "this machine has no CUDA device, or Transformer Engine is not installed"
    if transformer_engine:
        import transformer_engine.pytorch as te

        found, reason = getattr(te, RECIPES[recipe])(return_reason=True)
    if not found:
        raise UserError(
            f"teacher.fp8_recipe = {recipe} is not available here: {reason}. per_channel_log, "
            "per_channel and block_128 need neither Transformer Engine nor FP8 hardware"
        )


def check_shapes(architecture: Architecture, parallel: ParallelConfig, recipe: str) -> None:
    """Raises `UserError` unless FP8 matrix products accept the weights' shapes on every rank.

    The message names the width and the multiple it has to be.
    """
    multiple = 32 if recipe == "mxfp8" else 16
    if recipe == "blockwise" and parallel.sequence_parallel and architecture.hidden_size % 128:
        raise UserError(
            "teacher.fp8_recipe = blockwise with parallel.sequence_parallel = true needs a hidden "
            f"size that is a multiple of 128, but model.teacher has {architecture.hidden_size}; "
            "take another recipe"
        )
    tp = parallel.tensor_model_parallel_size
    heads = architecture.num_attention_heads
    widths = {
        "hidden_size": architecture.hidden_size,
        "the attention heads' width on each rank": heads * architecture.value_dim // tp,
    }
    if (latent := architecture.latent) is None:
        groups = architecture.num_query_groups
        widths["the query, key and value heads' width on each rank"] = (
            (heads + 2 * groups) * architecture.head_dim // tp
        )
    else:
        widths |= {
            "q_lora_rank": latent.query_rank or architecture.hidden_size,
            "kv_lora_rank": latent.key_value_rank,
            "the query heads' width on each rank": heads * architecture.head_dim // tp,
            "the key and value heads' width on each rank": (
                heads * (latent.unrotated_dim + latent.value_dim) // tp
            ),
        }
    if not architecture.has_experts(0):
        widths["the feed-forward width on each rank"] = architecture.ffn_hidden_size // tp
    if architecture.moe is not None:
        etp = parallel.expert_tensor_size
        widths["each expert's feed-forward width on each rank"] = (
            architecture.moe.ffn_hidden_size // etp
        )
        if architecture.moe.shared_ffn_hidden_size is not None:
            widths["the shared expert's feed-forward width on each rank"] = (
                architecture.moe.shared_ffn_hidden_size // tp
            )
    for name, width in widths.items():
        if width % multiple:
            raise UserError(
                f"teacher.fp8_recipe = {recipe} needs multiples of {multiple}, but {name} of "
                f"model.teacher is {width}; take another recipe, or fewer ranks "
                "(parallel.tensor_model_parallel_size)"
            )


def token_multiple(recipe: str, *, sequence_parallel: bool) -> int:
    """The multiple that the number of tokens in a micro-batch must be, on each rank."""
    if recipe == "blockwise" and sequence_parallel:
        return 128  # activations are gathered in whole blocks
    return 32 if recipe == "mxfp8" else 16


def check_built(chunks: Sequence[GPTModel], *, fp8_layers: range) -> None:
    """Raises `UserError` if a weight of ``fp8_layers`` (from 0) is not FP8."""
    # megatron-core silently builds bf16 weights with a Transformer Engine that does not fit.
    for name, parameter in named_parameters(chunks).items():
        in_fp8_layer = any(name.startswith(f"decoder.layers.{layer}.") for layer in fp8_layers)
        if in_fp8_layer and is_linear_weight(name) and not is_float8tensor(parameter):
            raise UserError(
                f"teacher.precision = fp8, but megatron-core built {name} as "
                f"{type(parameter.data).__name__} of {parameter.dtype}: its version does not fit "
                "that of Transformer Engine. per_channel_log (teacher.fp8_recipe) does not need it"
            )


def fp8_stores(chunks: Sequence[GPTModel]) -> dict[str, Store]:
    """Stores for the FP8 weights in ``chunks``, by parameter name."""
    return {
        name: partial(_store, parameter)
        for name, parameter in named_parameters(chunks).items()
        if is_float8tensor(parameter)
    }


def num_bytes(weight: Any) -> int:
    """Bytes of a Transformer Engine FP8 weight, scales included."""
    return sum(part.nbytes for part in weight.get_metadata().values() if isinstance(part, Tensor))


def _store(
    parameter: torch.nn.Parameter,
    mapping: Mapping,
    pieces: Sequence[Piece],
    fill: Callable[[Tensor], None],
) -> None:
    # Indexing an FP8 weight gives a copy, so parts cannot be written in place.
    weight = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    fill(weight)
    parameter.copy_(weight)
