"""Writes the test cases of a new family, from the class that transformers has of it.

    python -m tests.helpers.new_family MODEL_TYPE [FIELD=VALUE ...]

MODEL_TYPE is transformers' name in config.json, such as cohere; a VALUE is JSON. The lines that are
printed belong in the files above them. docs/add-a-family.md goes through them.
"""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from checkpoint_tools.obstacles import find_obstacles
from tests.helpers.tiny import tiny_config

# Layouts of tests/models/test_transformers_parity.py: which parts of a model are cut in each.
DENSE_LAYOUTS = ("tp1", "tp2_sp", "pp2_vpp2")
EXPERT_LAYOUTS = ("tp1", "tp2_sp_ep2", "ep2_pp2_vpp2")


def cases(model_type: str, **fields: Any) -> str:
    """The lines for all files, each below its file's name in a comment.

    ``fields`` are those of the tiny model. Raises what transformers raises for a class or a field
    that it does not have.
    """
    config = tiny_config(model_type, **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # In their form on disk.
    tensors = revert_weight_conversion(model, model.state_dict())
    written = config.to_diff_dict() | {"architectures": [type(model).__name__]}
    found = find_obstacles(written, tensors)
    has_experts = any(".experts." in name for name in tensors)
    case = f"{model_type}_moe" if has_experts and "moe" not in model_type else model_type
    layouts = EXPERT_LAYOUTS if has_experts else DENSE_LAYOUTS
    return "\n".join(
        [
            f"# megatron_oprd/models/families/{model_type}.py: a copy of {found.family}'s file",
            f"NAME = {type(model).__name__!r}",
            f"FIELDS = {{{_fields(config, found.fields)}}}",
            "# tensors to add to its table, with their shapes in the tiny model:",
            *_shapes(tensors, found.unknown_tensors),
            "# tensors to take out of it:",
            *(f"#   {name}" for name in found.missing_tensors),
            "# tests/helpers/tiny.py: _OF_FAMILY",
            f"_OF_FAMILY = {{{model_type!r}: {fields!r}}}",
            "# tests/models/test_transformers_parity.py: MODELS, COMBINATIONS",
            f"MODELS = {{{case!r}: ({model_type!r}, {{}})}}",
            f"COMBINATIONS = [*(({case!r}, layout) for layout in {layouts!r})]",
            "",
        ]
    )


def _fields(config: PretrainedConfig, refused: dict[str, Any]) -> str:
    """Entries with the value of the tiny model, the only one until another was tried."""
    return ", ".join(
        f"{name!r}: equals({getattr(config, name, value)!r})" for name, value in refused.items()
    )


def _shapes(tensors: dict[str, torch.Tensor], patterns: Sequence[str]) -> list[str]:
    lines = []
    for pattern in patterns:
        expression = re.escape(pattern).replace(r"\*", r"\d+")
        first = next(one for name, one in tensors.items() if re.fullmatch(expression, name))
        lines.append(f"#   {pattern}: {tuple(first.shape)}")
    return lines


def main(argv: Sequence[str]) -> None:
    """Prints the cases."""
    model_type, *settings = argv
    pairs = (setting.partition("=") for setting in settings)
    print(cases(model_type, **{name: json.loads(value) for name, _, value in pairs}))


if __name__ == "__main__":
    main(sys.argv[1:])
