"""Checks a GGUF file's metadata against the model that transformers builds from it.

For each architecture, transformers reads some keys and ignores the others. So every key has to be
known here: either the finished configuration agrees with it, or no number of the model depends on
it. Keys are llama.cpp's (gguf/constants.py).
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf import GGUFReader
from transformers import PreTrainedConfig
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from megatron_oprd.errors import UserError

T = TypeVar("T")

# Required, because transformers would use a default of the configuration's class.
_REQUIRED = (
    "context_length", "block_count", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.layer_norm_rms_epsilon",
)  # fmt: skip
# Keys about the file or the tokenizer, on which no number of the model depends.
_NEUTRAL = ("general.", "quantize.", "imatrix.", "GGUF.")
_TOKENIZER = {
    "tokenizer.chat_template", "tokenizer.huggingface.json",
    *(f"tokenizer.ggml.{name}" for name in (
        "model", "pre", "tokens", "scores", "token_type", "merges", "precompiled_charsmap",
        "add_space_prefix", "add_bos_token", "add_eos_token", "token_type_count",
    )),
}  # fmt: skip
# Values that switch a feature off. The key is accepted with one of these only.
_OFF: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_gating_func": (1,),  # softmax
    "expert_weights_scale": (0.0, 1.0),
    "expert_shared_feed_forward_length": (0,),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "tensor_data_layout": ("reference",),
}
# Whether the model was fine-tuned after the scaling of its positions: not a setting of the model.
_HARMLESS = ("rope.scaling.finetuned",)


@contextlib.contextmanager
def alone(gguf: Path) -> Iterator[Path]:
    """A temporary folder with only this file, because transformers also reads its neighbours."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / gguf.name).symlink_to(gguf.absolute())
        yield Path(folder)


def ask_transformers(gguf: Path, call: Callable[[], T]) -> T:
    """Calls transformers; raises any exception as a one-line `UserError`."""
    try:
        return call()
    except Exception as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"GGUF file {gguf}: transformers cannot read it: {type(error).__name__}: {text}"
        ) from error


def check_parts(gguf: Path, reader: GGUFReader) -> None:
    """Raises `UserError` for a part of a split model, or a file that is not a model."""
    kind = _value(reader, "general.type")
    if kind not in (None, "model"):
        raise UserError(
            f"GGUF file {gguf} has general.type = {kind!r}; give the file of a whole model."
        )
    if (parts := _value(reader, "split.count") or 1) > 1:
        raise UserError(
            f"GGUF file {gguf} is one of {parts} parts; merge them first (llama-gguf-split "
            "--merge)."
        )


def check_metadata(gguf: Path, reader: GGUFReader, config: PreTrainedConfig) -> None:
    """Raises `UserError` if a key is missing, unknown, or contradicts the configuration."""
    name = _value(reader, "general.architecture")
    for key in _REQUIRED:
        if f"{name}.{key}" not in reader.fields:
            raise UserError(
                f"GGUF file {gguf} has no {name}.{key}, for which transformers would take a "
                "default; give a file that has it."
            )
    for field in reader.fields:
        if field.startswith(f"{name}."):
            _check_number(gguf, field, field.removeprefix(f"{name}."), reader, config)
        elif field.startswith("tokenizer."):
            _check_tokenizer(gguf, field, reader)
        elif not field.startswith((*_NEUTRAL, "split.")):
            raise _unknown(gguf, field, _value(reader, field))


def _check_number(
    gguf: Path, field: str, key: str, reader: GGUFReader, config: PreTrainedConfig
) -> None:
    value, own = _value(reader, field), _values_of(config)
    if key in _HARMLESS:
        return
    if key in own:
        if not _same(value, own[key]):
            raise UserError(
                f"GGUF file {gguf}: {field} = {value!r}; the {config.model_type} model that "
                f"transformers builds from the file has {own[key]!r}, so that its numbers would be "
                "others."
            )
    elif key not in _OFF or value not in _OFF[key]:
        raise _unknown(gguf, field, value)


def _values_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The configuration's values under llama.cpp's keys, as far as its class has them."""
    rope = getattr(config, "rope_parameters", None) or {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope_type = rope.get("rope_type", "default")
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": _sliding_window(config),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.scaling.type": "none" if rope_type == "default" else rope_type,
        "rope.scaling.original_context_length": rope.get(
            "original_max_position_embeddings", config.max_position_embeddings
        ),
    }
    for key, name in (
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_weights_norm", "norm_topk_prob"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if hasattr(config, name):
            values[key] = getattr(config, name)
    return values


def _sliding_window(config: PreTrainedConfig) -> int:
    """The window in tokens; 0 if all layers attend to everything."""
    # Classes without layer types slide in every layer.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    return window if window and "sliding_attention" in kinds else 0


def _same(value: Any, own: Any) -> bool:
    if isinstance(value, float) and isinstance(own, int | float):
        return bool(np.float32(value) == np.float32(own))  # GGUF stores 32-bit floats
    return value == own


def _check_tokenizer(gguf: Path, field: str, reader: GGUFReader) -> None:
    value = _value(reader, field)
    # Special tokens do not enter the model's numbers.
    if field.startswith("tokenizer.ggml.") and field.endswith("_token_id"):
        return
    if field == "tokenizer.chat_templates" or field.startswith("tokenizer.chat_template."):
        return  # `chat_templates` reads them
    if field == "tokenizer.ggml.pre" and _value(reader, "tokenizer.ggml.model") == "gpt2":
        # transformers treats unknown kinds as GPT-2's, which is right for these only.
        if value not in GGUF_PRE_TOKENIZER_SPLITS and value not in _GPT2_SPLITS:
            raise UserError(
                f"GGUF file {gguf}: {field} = {value!r}; transformers does not know how this "
                "tokenizer splits text, and would split it as GPT-2 does."
            )
        return
    off = field in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.add_sep_token")
    if field not in _TOKENIZER and not (off and not value):
        raise _unknown(gguf, field, value)


# llama.cpp's names of tokenizers that split text by GPT-2's expression or an equivalent.
_GPT2_SPLITS = {"default", "gpt-2", "gpt2", "smollm", "phi-2", "olmo", "mpt", "starcoder"}


def chat_templates(reader: GGUFReader) -> dict[str, str]:
    """The file's chat templates by name; transformers itself reads the default one only."""
    prefix = "tokenizer.chat_template"
    return {
        field.removeprefix(f"{prefix}.").replace(prefix, "default"): _value(reader, field)
        for field in reader.fields
        if field == prefix or field.startswith(f"{prefix}.")
    }


def _value(reader: GGUFReader, field: str) -> Any:
    return reader.fields[field].contents() if field in reader.fields else None


def _unknown(gguf: Path, field: str, value: Any) -> UserError:
    return UserError(
        f"GGUF file {gguf} has {field} = {str(value)[:80]!r}, which this tool does not know. It "
        "may change the model's numbers and would be lost, so the file is refused."
    )
