"""The model that an engine generates with."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from megatron_oprd.data.tokenizers import eos_token_ids, pad_token_id


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model without its weights, which `RolloutEngine.load_weights` brings."""

    folder: Path  # Hugging Face folder; of its files only the configurations are read
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype  # of weights and activations
    max_model_len: int  # tokens of the longest prompt with its response
    owner: str  # names the run whose weights these are, for a server of several runs

    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence tokens; UserError if neither folder nor tokenizer defines one."""
        return eos_token_ids(self.folder, self.tokenizer)

    def pad_token_id(self) -> int:
        """A token for padding, which is masked."""
        return pad_token_id(self.tokenizer)

    def known_ids(self) -> Collection[int]:
        """The tokenizer's ids; other ids pad the embedding and are never sampled."""
        return self.tokenizer.get_vocab().values()

    def decode(self, ids: Sequence[int]) -> str:
        """Text with special tokens, which stop texts may contain."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)
