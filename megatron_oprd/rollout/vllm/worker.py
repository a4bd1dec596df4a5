"""Worker extension of vLLM: receives, applies and reads back weights.

VLLM_SERVER_DEV_MODE=1 vllm serve DIR --enable-scale-out \
    --worker-extension-cls megatron_oprd.rollout.vllm.worker.WeightReceiver
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_oprd.rollout.vllm.bucket import BucketHandle, ReceivingBucket, receive_through
from megatron_oprd.rollout.vllm.sockets import WorkerSocket, receive_weights
from megatron_oprd.weights.casting import dtype_name
from megatron_oprd.weights.checksum import checksum

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_tied_head(
    stream: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], *, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """Adds the tied LM head that vLLM's ``reload_weights`` expects; records shapes."""
    for name, tensor in stream:
        shapes[name] = tuple(tensor.shape)
        yield name, tensor
        if tied and name == EMBEDDING:
            # vLLM may keep a packed copy of the LM head, which is renewed only under its own name.
            yield HEAD, tensor


@contextmanager
def quiet_about_missing(quiet: bool) -> Iterator[None]:
    """Silences vLLM's warning for each module without new weights, for partial syncs."""
    logger = logging.getLogger("vllm.model_executor.model_loader.reload")
    level = logger.level
    if quiet:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def mask_ids(model: Any, ids: Sequence[int]) -> None:
    """Sets the logits of ``ids`` to -inf for all requests; a second call replaces the ids.

    ``model`` is one of vLLM's decoders.
    """
    never = torch.tensor(ids, dtype=torch.long, device=next(model.parameters()).device)
    # The class's method, so that a second call does not wrap the first mask.
    compute_logits = type(model).compute_logits

    def masked(*args: Any, **kwargs: Any) -> Tensor | None:
        logits = compute_logits(model, *args, **kwargs)
        return None if logits is None else logits.index_fill_(-1, never, float("-inf"))

    model.compute_logits = masked


_ROWS = 256


def value_checksum(tensor: Tensor) -> str:
    """xxh3_128 of a tensor's values; -0 counts as 0, as reading weights back may turn it."""
    return checksum(tensor.detach() + 0.0)


@torch.no_grad()
def checksums_of_engine(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Checksums of a vLLM model's weights by name, given the shapes of the checkpoint's tensors.

    Collective over vLLM's workers: shards are gathered on the tensor-parallel group, one tensor at
    a time. Experts are left out: vLLM keeps them in the format of its kernels.
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
            # Either also one tensor in the checkpoint (Phi-3), or a parameter that is not checked.
            of_checkpoint = [name] if name in shapes else []
        if not of_checkpoint:
            continue
        module = model.get_submodule(module_name)
        values: Tensor = parameter
        # vLLM's CPU linear layers may keep only a packed copy and empty the parameter.
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
        # A tied head's packed copy must equal the embedding; it is reported under its own name.
        rows, columns = shapes[EMBEDDING]
        found[HEAD] = value_checksum(_whole(head, _read_through(head, columns))[:rows])
    return found


def _read_through(module: Any, columns: int) -> Tensor:
    """Reads this worker's weight [out, in] of a linear layer that has only a packed copy.

    The layer's outputs for unit vectors are exact: each is one weight times 1, plus zeros.
    """
    columns = getattr(module, "input_size_per_partition", columns)
    vectors = torch.eye(columns, dtype=module.weight.dtype)
    answers = [module.cpu_linear(part, module.weight, None) for part in vectors.split(_ROWS)]
    return torch.cat(answers).t()


def _whole(module: Any, values: Tensor) -> Tensor:
    """Gathers a parameter from the workers' shards, in the checkpoint's order."""
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
        return gathered(values, 0)  # the vocabulary's padding comes last
    if isinstance(module, RowParallelLinear):
        return gathered(values, 1) if values.ndim == 2 else values  # the bias is replicated
    assert isinstance(module, ColumnParallelLinear), type(module)
    # Fused layers: each worker holds a part of q, k and v (or gate and up). With fewer key/value
    # heads than workers, consecutive workers hold the same heads.
    copies = [1] * len(module.output_partition_sizes)
    if isinstance(module, QKVParallelLinear):
        copies = [1, module.num_kv_head_replicas, module.num_kv_head_replicas]
    parts = []
    for shard, repeated in zip(values.split(module.output_partition_sizes), copies, strict=True):
        by_worker = gathered(shard, 0).unflatten(0, (module.tp_size, -1))
        parts.append(by_worker[::repeated].flatten(0, 1))
    return torch.cat(parts)


class WeightReceiver:
    """Methods that vLLM adds to its worker class, called with ``collective_rpc``."""

    vllm_config: Any
    model_runner: Any
    reload_weights: Any
    _oprd_bucket: ReceivingBucket

    def oprd_describe(self) -> dict[str, Any]:
        """Returns the served model's config and the server's settings."""
        model = self.vllm_config.model_config
        return {
            "config": json.loads(model.hf_config.to_json_string(use_diff=False)),
            "dtype": dtype_name(model.dtype),
            "max_model_len": model.max_model_len,
            "logprobs_mode": str(model.logprobs_mode),
            "quantization": None if model.quantization is None else str(model.quantization),
        }

    def oprd_mask(self, ids: list[int]) -> None:
        """Excludes these ids from sampling."""
        mask_ids(self.model_runner.get_model(), ids)

    def oprd_map(self, handle: BucketHandle) -> None:
        """Maps the buffer through which an engine on the trainer's machine gets its weights."""
        self._oprd_bucket = ReceivingBucket(handle)

    def oprd_receive(
        self, invitation: dict[str, Any], options: dict[str, Any], dtype: str | None = None
    ) -> dict[str, Any]:
        """Replaces weights by the tensors that the trainer sends.

        ``options`` are ``tied`` (LM head is the embedding), ``keep`` (read the weights back) and
        ``left_out`` (shapes of unchanged weights). Returns ``checksums`` by tensor name, empty
        without ``keep``; or ``error`` if the trainer disconnected early.
        """
        shapes: dict[str, tuple[int, ...]] = dict(options["left_out"])
        failures: list[str] = []

        def arriving() -> Iterator[tuple[str, Tensor]]:
            try:
                with WorkerSocket(**invitation) as trainer:
                    # Only an engine next to the trainer maps the buffer; a server gets tensors of
                    # this dtype over TCP.
                    if dtype is None:
                        yield from receive_through(self._oprd_bucket, trainer)
                    else:
                        yield from receive_weights(trainer, dtype=getattr(torch, dtype))
            except OSError as error:
                # Reported instead of raised: an exception here would end a server. Tensors that
                # arrived are loaded, and another sync can follow.
                failures.append(str(error))

        weights = with_tied_head(arriving(), shapes, tied=options["tied"])
        with quiet_about_missing(bool(options["left_out"])):
            self.reload_weights(weights_iterator=weights, is_checkpoint_format=True)
        if failures:
            return {"error": failures[0]}
        if not options["keep"]:
            return {"checksums": {}}
        return {"checksums": checksums_of_engine(self.model_runner.get_model(), shapes)}
