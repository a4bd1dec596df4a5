"""Tiny random models, saved as real ones are, and the settings of runs with them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

_END, _PAD = "<end>", "<pad>"
# Widths that every FP8 recipe takes on two ranks, and heads for them.
_FIELDS = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}
# Name of a pair -> transformers' model type, fields of its own, layers of student and teacher.
_PAIRS = {
    "dense": ("qwen3", {}, 4, 6),
    "experts": ("qwen3_moe", _EXPERTS, 4, 4),
}


def save_pairs(folder: Path) -> None:
    """Saves all pairs below ``folder``; the same weights on every machine with these versions."""
    logging.disable_progress_bar()
    tokenizer = _tokenizer()
    for name, (kind, fields, student_layers, teacher_layers) in _PAIRS.items():
        pair = folder / name
        for seed, (role, layers) in enumerate(
            (("student", student_layers), ("teacher", teacher_layers))
        ):
            config = AutoConfig.for_model(
                kind,
                **_FIELDS,
                **fields,
                num_hidden_layers=layers,
                vocab_size=len(tokenizer),
            )
            _save(pair / role, config, tokenizer, seed)
        (pair / "prompts.jsonl").write_text(
            "".join(
                json.dumps({"prompt": f"{a} plus {b} is"}) + "\n" for a in range(8) for b in "12"
            )
        )
        (pair / "run.yaml").write_text(
            f"""
output_dir: {pair / "run"}
tensorboard: false
model: {{student: {pair / "student"}, teacher: {pair / "teacher"}, params_dtype: fp32}}
data: {{prompts: [{pair / "prompts.jsonl"}], max_prompt_tokens: 32}}
rollout: {{prompts_per_step: 4, samples_per_prompt: 2, max_new_tokens: 12}}
"""
        )


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    tokens = [_END, _PAD, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=_END, pad_token=_PAD)


def _save(
    folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms stay near 1. Matrices are wide enough apart that a wrong one shows.
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
