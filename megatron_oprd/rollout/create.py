"""Creates the rollout engine that ``rollout.engine`` selects."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.data.tokenizers import eos_token_ids, pad_token_id
from megatron_oprd.rollout.engine import RolloutEngine
from megatron_oprd.rollout.hf import HFEngine
from megatron_oprd.rollout.vllm.engine import VLLMEngine
from megatron_oprd.rollout.vllm.server import VLLMServerEngine

EngineName = Literal["hf", "vllm"]


def create_engine(
    name: EngineName,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    device: torch.device,
    gpus: Sequence[str] = (),  # of `VLLMEngine`: names for CUDA_VISIBLE_DEVICES
    max_batch_size: int | None,  # responses generated at the same time; None: no limit
    max_model_len: int | None = None,  # vllm only: tokens of the longest prompt with its response
    vllm: VLLMConfig | None = None,
    owner: str = "",  # vllm server only: identifies the run whose weights the server has
) -> RolloutEngine:
    """Creates an engine without weights; call `RolloutEngine.load_weights` first.

    Raises UserError if neither ``folder`` nor tokenizer defines an end-of-sequence token.
    """
    eos, known_ids = eos_token_ids(folder, tokenizer), tokenizer.get_vocab().values()

    def decode(ids: Sequence[int]) -> str:
        # Stop texts may contain special tokens.
        return tokenizer.decode(ids, skip_special_tokens=False)

    if name == "vllm":
        assert max_model_len is not None
        assert vllm is not None
        if vllm.server_url is not None:
            return VLLMServerEngine(
                folder,
                dtype=dtype,
                eos_token_ids=eos,
                known_ids=known_ids,
                decode=decode,
                max_batch_size=max_batch_size,
                owner=owner,
                config=vllm,
            )
        return VLLMEngine(
            folder,
            dtype=dtype,
            device=device,
            gpus=gpus,
            eos_token_ids=eos,
            known_ids=known_ids,
            decode=decode,
            max_model_len=max_model_len,
            max_batch_size=max_batch_size,
            config=vllm,
        )
    return HFEngine(
        folder,
        dtype=dtype,
        device=device,
        eos_token_ids=eos,
        pad_token_id=pad_token_id(tokenizer),
        known_ids=known_ids,
        decode=decode,
        max_batch_size=max_batch_size,
    )
