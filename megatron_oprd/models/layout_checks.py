"""Checks from the configuration alone that a layout can share out a model."""

from collections.abc import Callable

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.parallel.layout import ParallelLayout

# (name, value) -> the size as the user wrote it.
Spelling = Callable[[str, int], str]


def as_flag(name: str, size: int) -> str:
    """A size as a command-line argument."""
    return f"--{name.replace('_', '-')} {size}"


def as_setting(name: str, size: int) -> str:
    """A size as a setting of a run's configuration."""
    return f"parallel.{name} = {size}"


def check_divides(
    architecture: Architecture,
    layout: ParallelLayout,
    *,
    model: str,  # for messages
    spelling: Spelling = as_flag,  # form of a size in messages
) -> None:
    """Checks that ranks can share each layer of a model; ignores the number of layers.

    Raises `UserError` if a size does not divide what it splits. Expert sizes are ignored for dense
    models.
    """
    tp = "tensor_model_parallel_size", layout.tensor_model_parallel_size
    divided = [(tp, "attention heads", architecture.num_attention_heads)]
    if not architecture.has_experts(0):
        divided.append((tp, "feed-forward width", architecture.ffn_hidden_size))
    if architecture.moe is not None:
        etp = "expert_tensor_parallel_size", layout.expert_tensor_size
        ep = "expert_model_parallel_size", layout.expert_model_parallel_size
        width = architecture.moe.ffn_hidden_size
        divided.append((etp, "feed-forward width of each expert", width))
        divided.append((ep, "experts", architecture.moe.num_experts))
        if architecture.moe.shared_ffn_hidden_size is not None:
            shared = architecture.moe.shared_ffn_hidden_size
            divided.append((tp, "feed-forward width of the shared expert", shared))
    for size, what, count in divided:
        if count % size[1]:
            raise UserError(
                f"{spelling(*size)} does not divide the {count} {what} of {model}; give a divisor "
                f"of {count}"
            )
    if architecture.delta is not None and architecture.delta.num_key_heads % tp[1]:
        count = architecture.delta.num_key_heads
        raise UserError(
            f"{spelling(*tp)} does not divide the {count} key heads of {model}'s linear attention; "
            f"give a divisor of {count}"
        )
    groups, ranks = architecture.num_query_groups, layout.tensor_model_parallel_size
    # With more ranks than groups, ranks share a group: see `mapping.QKV`.
    if groups % ranks and ranks % groups:
        raise UserError(
            f"{spelling(*tp)} neither divides the {groups} key/value heads of {model} nor is a "
            f"multiple of them; give a divisor or a multiple of {groups}"
        )


def check_expert_biases(
    architecture: Architecture,
    layout: ParallelLayout,
    *,
    model: str,  # for messages
    spelling: Spelling = as_flag,  # form of a size in messages
) -> None:
    """Raises `UserError` if Megatron would have to divide experts with biases over ranks."""
    size = layout.expert_tensor_size
    if architecture.moe is not None and architecture.mlp_bias and size != 1:
        name = "expert_tensor_parallel_size"
        raise UserError(
            f"{spelling(name, size)}, but Megatron does not divide experts with biases over ranks, "
            f"and those of {model} have them; give {spelling(name, 1)} (by default it is "
            "tensor_model_parallel_size), and expert_model_parallel_size to share them out"
        )


def refuse_expert_sizes(
    layout: ParallelLayout, *, models: str, spelling: Spelling = as_flag
) -> None:
    """Raises `UserError` if sizes for experts are given for models without any.

    ``models`` is a phrase for the message, such as ``MODEL has no``.
    """
    for name, size, default in (
        ("expert_model_parallel_size", layout.expert_model_parallel_size, 1),
        ("expert_tensor_parallel_size", layout.expert_tensor_parallel_size, None),
    ):
        if size is not None and size != default:
            raise UserError(
                f"{spelling(name, size)}, but {models} mixture of experts; leave it out"
            )


def check_layout(architecture: Architecture, layout: ParallelLayout, *, model: str) -> None:
    """Checks the sizes given to a tool for one model, except against its number of layers.

    Raises `UserError` if a size does not divide what it splits, or is for experts of a dense model.
    """
    if architecture.moe is None:
        refuse_expert_sizes(layout, models=f"{model} has no")
    check_divides(architecture, layout, model=model)
    check_expert_biases(architecture, layout, model=model)
