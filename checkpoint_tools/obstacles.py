"""What stands between an unsupported model and the supported family that is most like it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import (
    Architecture,
    DeltaNet,
    Latent,
    MixtureOfExperts,
    Rope,
    check_fields,
)
from megatron_oprd.models.families import FAMILIES
from megatron_oprd.models.families.decoder import Family
from megatron_oprd.weights.expert_parts import stored_shapes


@dataclass(frozen=True, kw_only=True)
class Obstacles:
    """Differences of a checkpoint from a supported family; its numbers may differ in code as well.

    Patterns are names of tensors with ``*`` in the place of numbers.
    """

    family: str  # the supported class whose tensors are most like the checkpoint's
    fields: dict[str, Any]  # of the configuration: unknown for the family, or with another value
    unknown_tensors: list[str]  # patterns that no model of the family has
    missing_tensors: list[str]  # patterns that every model of the family has


def find_obstacles(config: dict[str, Any], names: Iterable[str]) -> Obstacles:
    """Compares config.json and the tensors' names with the supported families.

    A model whose class is supported is compared with its own family. Of a configuration with
    ``text_config`` the fields in there are compared.
    """
    patterns = {_pattern(name) for name in names}
    named = [FAMILIES[name] for name in config.get("architectures") or [] if name in FAMILIES]
    family = max(named or FAMILIES.values(), key=lambda one: _likeness(one, patterns))
    text = config.get("text_config")
    fields = text if isinstance(text, dict) else config
    return Obstacles(
        family=family.name,
        fields={name: value for name, value in fields.items() if _refused(family, name, value)},
        unknown_tensors=sorted(patterns - _tensors(family, everything=True)),
        missing_tensors=sorted(_tensors(family, everything=False) - patterns),
    )


def _likeness(family: Family, patterns: set[str]) -> int:
    """Patterns in common, less those of one side alone."""
    possible, needed = (_tensors(family, everything=one) for one in (True, False))
    return len(patterns & possible) - len(patterns - possible) - len(needed - patterns)


def _refused(family: Family, name: str, value: Any) -> bool:
    try:
        check_fields({name: value}, required=family.fields, source="config.json")
    except UserError:
        return True
    return False


def _tensors(family: Family, *, everything: bool) -> set[str]:
    """Patterns of a family's tensors: with all that is optional, or with none of it."""
    # Queries of latent attention are made in one of two ways.
    ways = [_tensors_with(family, query_rank, everything=everything) for query_rank in (2, None)]
    return set.union(*ways) if everything else set.intersection(*ways)


def _tensors_with(family: Family, query_rank: int | None, *, everything: bool) -> set[str]:
    # Names do not depend on these sizes.
    architecture = Architecture(
        family=family.name,
        num_layers=2,
        hidden_size=2,
        ffn_hidden_size=2,
        num_attention_heads=1,
        num_query_groups=1,
        head_dim=2,
        vocab_size=2,
        layernorm_epsilon=1e-6,
        rope=Rope(theta=1e4),
        tied=not everything,
        max_position_embeddings=2,
        qkv_bias=everything,
        output_bias=everything,
        mlp_bias=everything,
        qk_norm=everything,
        delta=DeltaNet(num_key_heads=1, values_per_key=1, key_dim=2, value_dim=2, kernel_size=2),
        delta_layers=(True, False),
        latent=Latent(
            query_rank=query_rank,
            key_value_rank=2,
            unrotated_dim=2,
            rotated_dim=2,
            value_dim=2,
            norm_epsilon=1e-6,
        ),
        moe=MixtureOfExperts(
            num_experts=2,
            num_experts_per_token=2,
            ffn_hidden_size=2,
            norm_topk_prob=True,
            shared_ffn_hidden_size=2,
            first_dense_layers=1 if everything else 0,
        ),
    )
    table = family.mappings(architecture, architecture.vocab_size)
    return {_pattern(name) for name in stored_shapes(table)}


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
