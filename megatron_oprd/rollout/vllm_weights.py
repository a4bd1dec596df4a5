"""What is done to a vLLM model where it runs: weights in, weights read back, ids masked."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_oprd.weights.checksum import checksum

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 256


def with_tied_head(
    stream: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], *, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """The stream as vLLM's ``reload_weights`` wants it; ``shapes`` gets what came."""
    for name, tensor in stream:
        shapes[name] = tuple(tensor.shape)
        yield name, tensor
        if tied and name == EMBEDDING:
            # vLLM may keep a packed copy for the LM head, which only its own name renews.
            yield HEAD, tensor


def mask_ids(model: Any, ids: Sequence[int]) -> None:
    """Makes the logits of some ids -inf, whatever samples from them. Again: of others instead.

    Args:
        model: One of vLLM's decoders.
        ids: Ids that mean nothing.
    """
    never = torch.tensor(ids, dtype=torch.long, device=next(model.parameters()).device)
    compute_logits = type(model).compute_logits

    def masked(*args: Any, **kwargs: Any) -> Tensor | None:
        logits = compute_logits(model, *args, **kwargs)
        return None if logits is None else logits.index_fill_(-1, never, float("-inf"))

    model.compute_logits = masked


def value_checksum(tensor: Tensor) -> str:
    """xxh3_128 of a tensor's values; -0 counts as 0, because reading weights back may turn it."""
    return checksum(tensor.detach() + 0.0)


@torch.no_grad()
def checksums_of_engine(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The checksums of a vLLM model's weights.

    Args:
        model: One of vLLM's decoders, not split over ranks, in its working format.
        shapes: Shape of every tensor of the checkpoint, by name.

    Returns:
        A checksum by name, for each of ``shapes`` that can be read: not for experts, which vLLM
        keeps in a format of its kernels.
    """
    fused: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    found = {}
    for name, parameter in model.named_parameters():
        module_name, _, field = name.rpartition(".")
        prefix, _, last = module_name.rpartition(".")
        of_checkpoint = [
            f"{prefix}.{part}.{field}" if prefix else f"{part}.{field}"
            for part in fused.get(last, [last])
        ]
        if not all(one in shapes for one in of_checkpoint):
            # One tensor in the checkpoint, too (Phi-3), or none that this knows.
            of_checkpoint = [name] if name in shapes else []
        if not of_checkpoint:
            continue
        module = model.get_submodule(module_name)
        values: Tensor = parameter
        if not parameter.numel():
            values = _read_through(module, columns=shapes[of_checkpoint[0]][1])
        row = 0
        for one in of_checkpoint:
            rows = shapes[one][0]
            found[one] = value_checksum(values[row : row + rows])
            row += rows
    head = getattr(model, "lm_head", None)
    if HEAD not in shapes and hasattr(head, "cpu_linear"):
        # A tied head's packed copy has to be the embedding; it is reported under its own name.
        rows, columns = shapes[EMBEDDING]
        found[HEAD] = value_checksum(_read_through(head, columns)[:rows])
    return found


def _read_through(module: Any, columns: int) -> Tensor:
    """The weight [out, in] of a linear layer that has only a packed copy of it.

    That is its answer to unit vectors: each output is one weight times 1 plus zeros, which is
    exact.
    """
    vectors = torch.eye(columns, dtype=module.weight.dtype)
    answers = [module.cpu_linear(part, module.weight, None) for part in vectors.split(_ROWS)]
    return torch.cat(answers).t()
