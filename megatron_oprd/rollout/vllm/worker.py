"""Worker extension of vLLM: excludes ids from sampling, and sees the weights that arrive.

VLLM_SERVER_DEV_MODE=1 vllm serve DIR --enable-scale-out \
    --worker-extension-cls megatron_oprd.rollout.vllm.worker.WeightReceiver \
    --weight-transfer-config '{"backend": "nccl"}'
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory

from megatron_oprd.rollout.vllm.messages import EMBEDDING, HEAD
from megatron_oprd.rollout.vllm.transfers import SHARED_MEMORY, TCP
from megatron_oprd.weights.casting import dtype_name
from megatron_oprd.weights.checksum import checksum

_ENGINES = "megatron_oprd.rollout.vllm.host_engines"
# vLLM imports this module in each worker, before it creates the engine that its settings name.
WeightTransferEngineFactory.register_engine(SHARED_MEMORY, _ENGINES, "SharedMemoryEngine")
WeightTransferEngineFactory.register_engine(TCP, _ENGINES, "TCPEngine")


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


def watch_weights(model: Any, *, tied: bool, digests: dict[str, str] | None) -> None:
    """Sees the checkpoint's tensors on their way into the model, whatever engine brings them.

    ``digests``, if given, gets the checksum of each. With ``tied`` the embedding is loaded as the
    LM head, too: vLLM may keep a packed copy of the head, which is renewed only under its own name.
    A second call replaces the first.
    """
    load_weights = type(model).load_weights

    def seen(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if digests is not None:
                digests[name] = checksum(tensor)
            yield name, tensor
            # Gemma 2's class computes logits with the embedding itself.
            if tied and name == EMBEDDING and hasattr(model, "lm_head"):
                yield HEAD, tensor

    model.load_weights = lambda weights: load_weights(model, seen(weights))


class WeightReceiver:
    """Methods that vLLM adds to its worker class, called with ``collective_rpc``."""

    vllm_config: Any
    model_runner: Any
    device: torch.device
    _oprd_digests: dict[str, str]

    def oprd_describe(self) -> dict[str, Any]:
        """Returns the served model's config and the server's settings."""
        model = self.vllm_config.model_config
        transfer = self.vllm_config.weight_transfer_config
        return {
            "config": json.loads(model.hf_config.to_json_string(use_diff=False)),
            "dtype": dtype_name(model.dtype),
            "max_model_len": model.max_model_len,
            "logprobs_mode": str(model.logprobs_mode),
            "quantization": None if model.quantization is None else str(model.quantization),
            "weight_transfer": None if transfer is None else transfer.backend,
        }

    def oprd_gpu(self) -> str | None:
        """The UUID of this worker's GPU; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return str(torch.cuda.get_device_properties(self.device).uuid)

    def oprd_prepare(self, never: list[int], tied: bool, keep_digests: bool) -> None:
        """Before an update: excludes ids from sampling, and has arriving weights seen."""
        self._oprd_digests = {}
        model = self.model_runner.get_model()
        mask_ids(model, never)
        watch_weights(model, tied=tied, digests=self._oprd_digests if keep_digests else None)
        # vLLM warns of each module without new weights, as those that do not train. The trainer
        # has checked that nothing else is missing.
        logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)

    def oprd_digests(self) -> dict[str, str]:
        """Checksums of the tensors that came since `oprd_prepare`, by name."""
        return self._oprd_digests
