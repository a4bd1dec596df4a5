"""What a vLLM server's workers can do besides, for a trainer that sends them weights.

VLLM_SERVER_DEV_MODE=1 vllm serve DIR --enable-scale-out \
    --worker-extension-cls megatron_oprd.rollout.vllm_extension.WeightReceiver
"""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.rollout.bucket import BucketHandle, ReceivingBucket, receive_through
from megatron_oprd.rollout.vllm_readback import checksums_of_engine
from megatron_oprd.rollout.vllm_weights import mask_ids, quiet_about_missing, with_tied_head
from megatron_oprd.rollout.weight_socket import receive_weights
from megatron_oprd.rollout.worker_socket import WorkerSocket
from megatron_oprd.weights.casting import dtype_name


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
