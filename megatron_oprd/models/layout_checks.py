"""Whether a model can be shared out as a layout says, found out from its configuration alone."""

from collections.abc import Callable

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.weights.torch_dist_plan import TargetLayout

# Writes a size, given by its name and value, as the user gave it.
Spelling = Callable[[str, int], str]


def as_flag(name: str, size: int) -> str:
    """A size as an argument of the command line."""
    return f"--{name.replace('_', '-')} {size}"


def as_setting(name: str, size: int) -> str:
    """A size as a setting of a run's configuration."""
    return f"parallel.{name} = {size}"


def check_divides(
    architecture: Architecture,
    layout: TargetLayout,
    *,
    model: str,
    spelling: Spelling = as_flag,
) -> None:
    """Checks that ranks can share each layer of a model; says nothing of its number of layers.

    Args:
        architecture: The model's.
        layout: The layout. Sizes for experts are not looked at where there are none.
        model: What gives the model, for messages.
        spelling: How a size is written in messages.

    Raises:
        UserError: A size does not divide what it has to.
    """
    tp = "tensor_model_parallel_size", layout.tensor_model_parallel_size
    divided = [(tp, "attention heads", architecture.num_attention_heads)]
    if architecture.moe is None:
        divided.append((tp, "feed-forward width", architecture.ffn_hidden_size))
    else:
        etp = "expert_tensor_parallel_size", layout.expert_tensor_size
        ep = "expert_model_parallel_size", layout.expert_model_parallel_size
        width = architecture.moe.ffn_hidden_size
        divided.append((etp, "feed-forward width of each expert", width))
        divided.append((ep, "experts", architecture.moe.num_experts))
    for size, what, count in divided:
        if count % size[1]:
            raise UserError(f"{spelling(*size)} does not divide the {count} {what} of {model}")
    groups, ranks = architecture.num_query_groups, layout.tensor_model_parallel_size
    if groups % ranks and ranks % groups:
        raise UserError(
            f"{spelling(*tp)} neither divides the {groups} key/value heads of {model}, nor is a "
            "multiple of them"
        )


def refuse_expert_sizes(layout: TargetLayout, *, models: str, spelling: Spelling = as_flag) -> None:
    """Refuses sizes that only experts have, for models without any.

    Args:
        layout: The layout.
        models: What has no experts, for messages: ``MODEL has no``.
        spelling: How a size is written in messages.

    Raises:
        UserError: Such a size is given.
    """
    for name, size, default in (
        ("expert_model_parallel_size", layout.expert_model_parallel_size, 1),
        ("expert_tensor_parallel_size", layout.expert_tensor_parallel_size, None),
    ):
        if size is not None and size != default:
            raise UserError(
                f"{spelling(name, size)}, but {models} mixture of experts; leave it out"
            )


def check_layout(architecture: Architecture, layout: TargetLayout, *, model: str) -> None:
    """Checks the sizes that a tool got for one model, but for the number of its layers.

    Raises:
        UserError: A size does not divide what it has to, or is for experts that there are not.
    """
    if architecture.moe is None:
        refuse_expert_sizes(layout, models=f"{model} has no")
    check_divides(architecture, layout, model=model)
