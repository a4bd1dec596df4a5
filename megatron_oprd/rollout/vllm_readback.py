"""A vLLM model's weights, read back from where it runs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_oprd.rollout.vllm_weights import EMBEDDING, HEAD
from megatron_oprd.weights.checksum import checksum

_ROWS = 256


def value_checksum(tensor: Tensor) -> str:
    """xxh3_128 of a tensor's values; -0 counts as 0, because reading weights back may turn it."""
    return checksum(tensor.detach() + 0.0)


@torch.no_grad()
def checksums_of_engine(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The checksums of a vLLM model's weights.

    Where it is split over workers, all of them have to call: shards are gathered on vLLM's
    tensor-parallel group, one tensor at a time.

    Args:
        model: One of vLLM's decoders, in its working format.
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
        values = _whole(module, values)
        row = 0
        for one in of_checkpoint:
            rows = shapes[one][0]
            found[one] = value_checksum(values[row : row + rows])
            row += rows
    head = getattr(model, "lm_head", None)
    if HEAD not in shapes and hasattr(head, "cpu_linear"):
        # A tied head's packed copy has to be the embedding; it is reported under its own name.
        rows, columns = shapes[EMBEDDING]
        found[HEAD] = value_checksum(_whole(head, _read_through(head, columns))[:rows])
    return found


def _read_through(module: Any, columns: int) -> Tensor:
    """This worker's weight [out, in] of a linear layer that has only a packed copy of it.

    That is its answer to unit vectors: each output is one weight times 1 plus zeros, which is
    exact.

    Args:
        module: One of vLLM's layers.
        columns: Of the whole weight.
    """
    columns = getattr(module, "input_size_per_partition", columns)
    vectors = torch.eye(columns, dtype=module.weight.dtype)
    answers = [module.cpu_linear(part, module.weight, None) for part in vectors.split(_ROWS)]
    return torch.cat(answers).t()


def _whole(module: Any, values: Tensor) -> Tensor:
    """The parameter of which ``values`` are this worker's shard, in the checkpoint's order."""
    if getattr(module, "tp_size", 1) == 1:
        return values
    from vllm.distributed import tensor_model_parallel_all_gather
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    def gathered(shard: Tensor, dim: int) -> Tensor:
        return tensor_model_parallel_all_gather(shard.contiguous(), dim)

    if isinstance(module, VocabParallelEmbedding):
        return gathered(values, 0)  # padding comes last
    if isinstance(module, RowParallelLinear):
        return gathered(values, 1) if values.ndim == 2 else values  # every worker has the bias
    assert isinstance(module, ColumnParallelLinear), type(module)
    # Of q, k and v, or gate and up, each worker has a part. Where there are fewer key/value heads
    # than workers, several in a row have the same.
    copies = [1] * len(module.output_partition_sizes)
    if isinstance(module, QKVParallelLinear):
        copies = [1, module.num_kv_head_replicas, module.num_kv_head_replicas]
    parts = []
    for shard, repeated in zip(values.split(module.output_partition_sizes), copies, strict=True):
        by_worker = gathered(shard, 0).unflatten(0, (module.tp_size, -1))
        parts.append(by_worker[::repeated].flatten(0, 1))
    return torch.cat(parts)
