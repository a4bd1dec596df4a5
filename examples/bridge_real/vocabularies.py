"""Tokenizers that are trained on the spot, and a model's embeddings for them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_oprd.data.tokenizers import load_tokenizer

_START, _END, _UNKNOWN = "<|im_start|>", "<|im_end|>", "<unk>"
_CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def byte_level(texts: Sequence[str], vocab_size: int, folder: Path) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer (tokenizer.json), trained on ``texts``."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=_END, pad_token=_END, chat_template=_CHAT_TEMPLATE
    ).save_pretrained(folder)
    return load_tokenizer(folder)


def sentence_piece(texts: Sequence[str], vocab_size: int, folder: Path) -> PreTrainedTokenizerBase:
    """A SentencePiece BPE tokenizer with byte fallback (tokenizer.model), trained on ``texts``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=[_START, _END],
            minloglevel=2,
        )
    fields = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "eos_token": _END,
        "pad_token": _END,
        "unk_token": _UNKNOWN,
        "chat_template": _CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return load_tokenizer(folder)


@torch.no_grad()
def with_vocabulary(
    model: LlamaForCausalLM, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase
) -> LlamaForCausalLM:
    """Gives a model (in place) another tokenizer's embeddings, made of its own.

    A new token's row is the mean of the rows of the old tokens that spell its text; a token with
    the old one's name keeps its row; one that they do not spell, as a part of a character, gets
    the mean of all rows.
    """
    rows = model.get_input_embeddings().weight
    names = old.get_vocab()
    made = []
    for token_id in range(len(new)):
        name = new.convert_ids_to_tokens(token_id)
        # Nothing for a part of a character, and for one that the old vocabulary has no token for.
        spelled = old(_text(new, token_id), add_special_tokens=False)["input_ids"]
        if name in old.all_special_tokens:
            made.append(rows[names[name]])
        else:
            made.append((rows[spelled] if spelled else rows).mean(dim=0))
    table = torch.stack(made)
    model.resize_token_embeddings(len(new), mean_resizing=False)
    model.get_input_embeddings().weight.copy_(table)
    for config in (model.config, model.generation_config):
        config.bos_token_id = None
        config.eos_token_id = new.eos_token_id
        config.pad_token_id = new.pad_token_id
    return model


def _text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """What a token says, spaces included; nothing where it is no whole character."""
    name = tokenizer.convert_ids_to_tokens(token_id)
    if found := _BYTE.fullmatch(name):
        return bytes([int(found[1], 16)]).decode("ascii", errors="ignore")
    if "▁" in name:  # SentencePiece's space, of which decoding drops the first
        return name.replace("▁", " ")
    return tokenizer.decode([token_id]).replace("\ufffd", "")
