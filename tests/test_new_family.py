"""The generator of a new family's test cases."""

import ast
from typing import Any

import pytest

from tests.helpers.new_family import cases
from tests.models.test_transformers_parity import ALL_LAYOUTS


def assigned(text: str) -> dict[str, str]:
    """The source of each assigned value; the text is Python."""
    return {
        ast.unparse(line.targets[0]): ast.unparse(line.value)
        for line in ast.parse(text).body
        if isinstance(line, ast.Assign)
    }


def test_an_unknown_class() -> None:
    text = cases("cohere", logit_scale=0.25)
    values = assigned(text)
    assert values["NAME"] == "'CohereForCausalLM'"
    assert "'logit_scale': equals(0.25)" in values["FIELDS"]
    assert "hidden_size" not in values["FIELDS"]
    assert ast.literal_eval(values["_OF_FAMILY"]) == {"cohere": {"logit_scale": 0.25}}
    assert ast.literal_eval(values["MODELS"]) == {"cohere": ("cohere", {})}


def test_tensors_of_an_unknown_class() -> None:
    assert "#   model.layers.*.mlp.c_fc.weight: (64, 32)" in cases("starcoder2")


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}), ("cohere", {})],
)
def test_layouts_fit_the_kind_of_model(model_type: str, fields: dict[str, Any]) -> None:
    combinations = assigned(cases(model_type, **fields))["COMBINATIONS"]
    named = [name for name in ALL_LAYOUTS if f"'{name}'" in combinations]
    assert len(named) == 3
    assert any("ep2" in name for name in named) == (model_type == "olmoe")


def test_a_known_family_has_nothing_to_decide() -> None:
    text = cases("qwen3")
    assert assigned(text)["FIELDS"] == "{}"
    assert "#   " not in text
    assert "a copy of Qwen3ForCausalLM's file" in text
