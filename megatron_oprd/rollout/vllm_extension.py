"""What a vLLM server's workers can do besides, for a trainer that sends them weights.

VLLM_SERVER_DEV_MODE=1 vllm serve DIR --enable-scale-out \
    --worker-extension-cls megatron_oprd.rollout.vllm_extension.WeightReceiver
"""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.rollout.vllm_weights import checksums_of_engine, mask_ids, with_tied_head
from megatron_oprd.rollout.weight_socket import receive_weights


class WeightReceiver:
    """Methods that vLLM adds to its worker, for ``POST /collective_rpc``."""

    vllm_config: Any
    model_runner: Any
    reload_weights: Any

    def oprd_describe(self) -> dict[str, Any]:
        """What the server serves: its model's config, and how it was started."""
        model = self.vllm_config.model_config
        return {
            "config": json.loads(model.hf_config.to_json_string(use_diff=False)),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "logprobs_mode": str(model.logprobs_mode),
        }

    def oprd_mask(self, ids: list[int]) -> None:
        """Never samples these ids."""
        mask_ids(self.model_runner.get_model(), ids)

    def oprd_receive(
        self, host: str, port: int, token: str, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Replaces all weights by those that a `WeightSender` sends.

        Args:
            host: Where it listens.
            port: Where it listens.
            token: What it wants to hear.
            options: ``dtype`` of what it sends, ``tied`` (whether the LM head is the embedding),
                ``keep`` (whether to read the weights back), ``seconds`` for a part of it.

        Returns:
            ``checksums``: with ``keep`` that of every tensor as the model has it, by name; else
            nothing. Where the sender left before the end, ``error`` instead.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        failures: list[str] = []

        def arriving() -> Iterator[tuple[str, Tensor]]:
            dtype = getattr(torch, options["dtype"])
            try:
                yield from receive_weights(
                    host, port, token, dtype=dtype, seconds=options["seconds"]
                )
            except OSError as error:
                # Not an exception of this method, which would end the server. What has come is
                # loaded, and other weights can follow.
                failures.append(str(error))

        weights = with_tied_head(arriving(), shapes, tied=options["tied"])
        self.reload_weights(weights_iterator=weights, is_checkpoint_format=True)
        if failures:
            return {"error": failures[0]}
        if not options["keep"]:
            return {"checksums": {}}
        return {"checksums": checksums_of_engine(self.model_runner.get_model(), shapes)}
