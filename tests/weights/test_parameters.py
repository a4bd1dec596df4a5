"""Names of live parameters, for modules that cannot be built without Transformer Engine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_oprd.weights.megatron_keys import named_parameters


def module(**children: Any) -> Any:
    """A module with parameters, modules, and other attributes of the given names."""
    made = torch.nn.Module()
    for name, child in children.items():
        setattr(made, name, child)
    return made


def linear(*names: str) -> Any:
    return module(**{name: torch.nn.Parameter(torch.empty(1)) for name in names})


@pytest.mark.parametrize(("first", "count"), [(0, 12), (12, 4)])
def test_grouped_experts_get_the_names_of_the_table(first: int, count: int) -> None:
    """TEGroupedMLP numbers the matrices of a rank's experts from 0."""
    weights = [f"weight{number}" for number in range(count)]
    experts = module(linear_fc1=linear(*weights), linear_fc2=linear(*weights))
    layer = module(
        layer_number=3,
        submodules_config=SimpleNamespace(sharded_state_dict_keys_map={}),
        pre_mlp_layernorm=linear("weight"),
        mlp=module(
            local_expert_indices=list(range(first, first + count)),
            router=linear("weight"),
            experts=experts,
        ),
    )
    chunk = module(decoder=module(layers=torch.nn.ModuleList([layer])))
    prefix = "decoder.layers.2"
    expected = {
        f"{prefix}.pre_mlp_layernorm.weight": layer.pre_mlp_layernorm.weight,
        f"{prefix}.mlp.router.weight": layer.mlp.router.weight,
    }
    for number, weight in enumerate(weights):
        expert = f"{prefix}.mlp.experts.experts.{first + number}"
        expected[f"{expert}.linear_fc1.weight"] = getattr(experts.linear_fc1, weight)
        expected[f"{expert}.linear_fc2.weight"] = getattr(experts.linear_fc2, weight)
    found = named_parameters([chunk])
    assert found.keys() == expected.keys()
    assert all(found[name] is expected[name] for name in expected)
