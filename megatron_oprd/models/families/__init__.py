"""The supported model families: configuration -> `Architecture`, and its table of mappings.

Each family is one file. A new one is a copy of the file most like it, named below.
"""

import functools
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.families import (
    deepseek_v3,
    exaone4,
    gemma2,
    gemma3,
    gemma3_images,
    glm4,
    glm4_moe,
    gpt_oss,
    granite,
    llama,
    minimax_m2,
    ministral3,
    mistral,
    mistral3,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_images,
    qwen3_5_moe,
    qwen3_5_moe_images,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
)
from megatron_oprd.models.families.decoder import Family
from megatron_oprd.models.families.nested import Nested
from megatron_oprd.weights.hf_files import HFCheckpoint, HFFolder
from megatron_oprd.weights.mapping import Mapping
from megatron_oprd.weights.quantization import read_quantization, without_quantization
from megatron_oprd.weights.source import WeightSource

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (
        deepseek_v3,
        exaone4,
        gemma2,
        gemma3,
        glm4,
        glm4_moe,
        gpt_oss,
        granite,
        llama,
        minimax_m2,
        ministral3,
        mistral,
        mixtral,
        olmo2,
        olmo3,
        phi3,
        qwen2,
        qwen2_moe,
        qwen3,
        qwen3_5,
        qwen3_5_moe,
        qwen3_moe,
        qwen3_next,
        seed_oss,
        smollm3,
    )
}


# Models whose decoder is of a family above.
NESTED: dict[str, Nested] = {
    module.NESTED.name: module.NESTED
    for module in (gemma3_images, mistral3, qwen3_5_images, qwen3_5_moe_images)
}


# Whatever has a configuration.
Folder = HFFolder | WeightSource


def read_architecture(checkpoint: Folder) -> Architecture:
    """Reads a model folder's configuration; no weight is read.

    Of a model with parts beside its decoder, the decoder's is returned.

    Raises:
        UserError: The architecture is not supported, or a field changes the model's numbers in a
            way that is not handled.
    """
    source = str(checkpoint.folder / "config.json")
    # Quantised weights are read as their values.
    read_quantization(checkpoint.config, source)
    raw = without_quantization(checkpoint.config)
    if (nested := nested_model(checkpoint)) is not None:
        nested.check(raw, source)
        text = _read_config(checkpoint, source).get_text_config()
        family = FAMILIES[nested.decoder_of(text.model_type, source)]
        written = {"model_type": text.model_type} | checkpoint.config["text_config"]
        family.check(written, f"{source} (text_config)")
        return family.architecture(text, f"{source} (text_config)")
    names = checkpoint.config.get("architectures") or []
    if names not in [[name] for name in FAMILIES]:
        raise UserError(
            f"{source}: architectures = {names}; supported are "
            f"{', '.join(sorted(FAMILIES | NESTED))}"
        )
    family = FAMILIES[names[0]]
    own = family.under_its_model_type(raw)
    family.check(own, source)
    return family.architecture(_read_config(checkpoint, source), source)


def under_known_model_type(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration that transformers reads: under the model_type of its own class."""
    names = config.get("architectures") or [None]
    family = FAMILIES.get(names[0])
    return config if family is None else family.under_its_model_type(config)


def _read_config(checkpoint: Folder, source: str) -> PretrainedConfig:
    known = under_known_model_type(checkpoint.config)
    try:
        if known is not checkpoint.config:
            return AutoConfig.for_model(**without_quantization(known))
        return AutoConfig.from_pretrained(checkpoint.hf_folder, local_files_only=True)
    except Exception as error:  # transformers' checks raise exceptions of many types
        raise UserError(f"{source}: {' '.join(str(error).split())}") from error


def nested_model(checkpoint: Folder) -> Nested | None:
    """What is known of a model with parts beside its decoder; None for a decoder alone."""
    names = checkpoint.config.get("architectures")
    return next((NESTED[name] for name in NESTED if names == [name]), None)


def decoder_config(checkpoint: Folder, nested: Nested) -> dict[str, Any]:
    """The content of config.json that the decoder has as a model of its own.

    Its configuration has to have passed `read_architecture`.
    """
    source = str(checkpoint.folder / "config.json")
    text = _read_config(checkpoint, source).get_text_config()
    config = text.to_diff_dict()
    config["architectures"] = [nested.decoder_of(text.model_type, source)]
    # The whole model's dtype, where the decoder has none of its own.
    dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if config.get("dtype") is None and dtype is not None:
        config["dtype"] = dtype
    return config


def unread_tensors(checkpoint: Folder) -> tuple[str, ...]:
    """Beginnings of the names of tensors that the supported model does not have."""
    (name,) = checkpoint.config["architectures"]
    return FAMILIES[name].unread(checkpoint.config)


def plain_names(checkpoint: HFCheckpoint) -> dict[str, str]:
    """Names on disk that begin with a family's `longer_prefix` -> the names of its table."""
    architectures = checkpoint.config.get("architectures") or [None]
    family = FAMILIES.get(architectures[0])
    if family is None or not family.longer_prefix:
        return {}
    names = checkpoint.names()
    plain = {
        name: "model." + name.removeprefix(family.longer_prefix)
        for name in names
        if name.startswith(family.longer_prefix)
    }
    # With both names on disk none is renamed, so that the longer ones are reported as left over.
    return {} if set(names) & set(plain.values()) else plain


def mapping_table(architecture: Architecture, *, padded_vocab_size: int) -> list[Mapping]:
    """Every parameter of the model, in the order of the Hugging Face model's own tensors."""
    return list(_table(architecture, padded_vocab_size))


# A search for a layout asks for the same few tables hundreds of times.
@functools.lru_cache(maxsize=8)
def _table(architecture: Architecture, padded_vocab_size: int) -> tuple[Mapping, ...]:
    return tuple(FAMILIES[architecture.family].mappings(architecture, padded_vocab_size))
