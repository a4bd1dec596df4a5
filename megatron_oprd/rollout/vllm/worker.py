"""The worker extension of a vLLM server: receives, applies and reads back weights.

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
    """The stream as vLLM's ``reload_weights`` wants it; ``shapes`` gets what came."""
    for name, tensor in stream:
        shapes[name] = tuple(tensor.shape)
        yield name, tensor
        if tied and name == EMBEDDING:
            # vLLM may keep a packed copy for the LM head, which only its own name renews.
            yield HEAD, tensor


@contextmanager
def quiet_about_missing(quiet: bool) -> Iterator[None]:
    """Where weights stay on purpose, vLLM does not warn of each module that it got none for."""
    logger = logging.getLogger("vllm.model_executor.model_loader.reload")
    level = logger.level
    if quiet:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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


class WeightReceiver:
    """Methods that vLLM adds to its worker, for ``collective_rpc``."""

    vllm_config: Any
    model_runner: Any
    reload_weights: Any
    _oprd_bucket: ReceivingBucket

    def oprd_describe(self) -> dict[str, Any]:
        """What the server serves: its model's config, and how it was started."""
        model = self.vllm_config.model_config
        return {
            "config": json.loads(model.hf_config.to_json_string(use_diff=False)),
            "dtype": dtype_name(model.dtype),
            "max_model_len": model.max_model_len,
            "logprobs_mode": str(model.logprobs_mode),
            "quantization": None if model.quantization is None else str(model.quantization),
        }

    def oprd_mask(self, ids: list[int]) -> None:
        """Never samples these ids."""
        mask_ids(self.model_runner.get_model(), ids)

    def oprd_map(self, handle: BucketHandle) -> None:
        """Maps the buffer that an engine in a process of the trainer's gets its weights through."""
        self._oprd_bucket = ReceivingBucket(handle)

    def oprd_receive(
        self, invitation: dict[str, Any], options: dict[str, Any], dtype: str | None = None
    ) -> dict[str, Any]:
        """Replaces weights by those that a trainer sends.

        Args:
            invitation: How to call it (`TrainerSocket`).
            options: ``tied`` (whether the LM head is the embedding), ``keep`` (whether to read the
                weights back), ``left_out`` (shapes of the weights that do not come and stay as they
                are).
            dtype: What it sends over the network; None if it sends through the buffer.

        Returns:
            ``checksums``: with ``keep`` that of every tensor as the model has it, by name; else
            nothing. Where the trainer left before the end, ``error`` instead.
        """
        shapes: dict[str, tuple[int, ...]] = dict(options["left_out"])
        failures: list[str] = []

        def arriving() -> Iterator[tuple[str, Tensor]]:
            try:
                with WorkerSocket(**invitation) as trainer:
                    if dtype is None:
                        yield from receive_through(self._oprd_bucket, trainer)
                    else:
                        yield from receive_weights(trainer, dtype=getattr(torch, dtype))
            except OSError as error:
                # Not an exception of this method, which would end a server. What has come is
                # loaded, and other weights can follow.
                failures.append(str(error))

        weights = with_tied_head(arriving(), shapes, tied=options["tied"])
        with quiet_about_missing(bool(options["left_out"])):
            self.reload_weights(weights_iterator=weights, is_checkpoint_format=True)
        if failures:
            return {"error": failures[0]}
        if not options["keep"]:
            return {"checksums": {}}
        return {"checksums": checksums_of_engine(self.model_runner.get_model(), shapes)}
