"""The supported model families: configuration -> `Architecture`, and its table of mappings.

Each family is one file. A new one is a copy of the file most like it, named below.
"""

from transformers import AutoConfig

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.families import (
    exaone4,
    glm4,
    glm4_moe,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
)
from megatron_oprd.models.families.decoder import Family
from megatron_oprd.weights.hf_files import HFFolder
from megatron_oprd.weights.mapping import Mapping

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (
        exaone4,
        glm4,
        glm4_moe,
        granite,
        llama,
        mistral,
        mixtral,
        olmo2,
        olmo3,
        phi3,
        qwen2,
        qwen2_moe,
        qwen3,
        qwen3_moe,
        seed_oss,
        smollm3,
    )
}


def read_architecture(checkpoint: HFFolder) -> Architecture:
    """Reads a model folder's configuration; no weight is read.

    Raises:
        UserError: The architecture is not supported, or a field changes the model's numbers in a
            way that is not handled.
    """
    source = str(checkpoint.folder / "config.json")
    names = checkpoint.config.get("architectures") or []
    if names not in [[name] for name in FAMILIES]:
        raise UserError(
            f"{source}: architectures = {names}; supported are {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[names[0]]
    family.check(checkpoint.config, source)
    try:
        hf_config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    except Exception as error:  # transformers' checks raise exceptions of many types
        raise UserError(f"{source}: {' '.join(str(error).split())}") from error
    return family.architecture(hf_config, source)


def unread_tensors(checkpoint: HFFolder) -> tuple[str, ...]:
    """Beginnings of the names of tensors that the supported model does not have."""
    (name,) = checkpoint.config["architectures"]
    return FAMILIES[name].unread(checkpoint.config)


def mapping_table(architecture: Architecture, *, padded_vocab_size: int) -> list[Mapping]:
    """Every parameter of the model, in the order of the Hugging Face model's own tensors."""
    return FAMILIES[architecture.family].mappings(architecture, padded_vocab_size)
