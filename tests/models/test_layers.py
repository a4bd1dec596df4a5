"""The interfaces of megatron-core that the Transformer Engine spec is made of.

Transformer Engine cannot be installed where there is no CUDA, so here only names and signatures
are checked; docs/gpu-checks.md says how to check the rest.
"""

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_oprd.errors import UserError
from megatron_oprd.models.build import build_model
from megatron_oprd.models.families import FAMILIES
from megatron_oprd.models.layers import layer_spec
from tests.helpers.tiny import tiny_config

SOURCE = ast.parse(Path(transformer_engine.__file__).read_text())


def test_spec_takes_the_arguments_we_give() -> None:
    function = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec
    target = inspect.unwrap(function)
    parameters = inspect.signature(target).parameters
    if "qk_layernorm" not in parameters:  # megatron-core 0.19 passes everything on
        target = gpt_layer_specs.get_gpt_layer_with_transformer_engine_submodules
        parameters = inspect.signature(target).parameters
    assert {"qk_layernorm", "num_experts", "moe_grouped_gemm"} <= parameters.keys()


def test_final_norm_takes_the_arguments_we_give() -> None:
    (norm,) = (n for n in ast.walk(SOURCE) if isinstance(n, ast.ClassDef) and n.name == "TENorm")
    (new,) = (n for n in norm.body if isinstance(n, ast.FunctionDef) and n.name == "__new__")
    assert [a.arg for a in new.args.args][:4] == ["cls", "config", "hidden_size", "eps"]


def test_transformer_engine_flag_exists() -> None:
    assert isinstance(transformer_engine.HAVE_TE, bool)


def test_fused_norms_have_the_names_of_the_table() -> None:
    """The local spec says under which names Transformer Engine's fused norms are saved."""
    spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    assert isinstance(spec.submodules, TransformerLayerSubmodules)
    renamed = spec.submodules.sharded_state_dict_keys_map
    assert renamed["input_layernorm."] + "weight" == "self_attention.linear_qkv.layer_norm_weight"
    assert renamed["pre_mlp_layernorm."] + "weight" == "mlp.linear_fc1.layer_norm_weight"


def test_the_norm_before_experts_keeps_its_name() -> None:
    """As in Transformer Engine's spec, where it is a module of its own."""
    submodules = layer_spec(qk_norm=True, num_experts=8, transformer_engine=False).submodules
    renamed = submodules.sharded_state_dict_keys_map
    assert renamed.keys() == {"input_layernorm."}
    function = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec
    source = Path(inspect.unwrap(function).__code__.co_filename).read_text()
    assert re.search(r"pre_mlp_layernorm=backend\.layer_norm\(.*\) if num_experts else", source)


def test_grouped_experts_number_their_matrices() -> None:
    """`named_parameters` takes the numbers for the rank's own experts."""
    source = inspect.getsource(TEGroupedMLP.sharded_state_dict)
    assert "{name}.weight{i}" in source
    assert "local_expert_indices_offset + i" in source


def test_a_softcap_of_scores_is_refused_with_transformer_engine() -> None:
    """Megatron does not hand it on; Transformer Engine 2.11 has no argument for it."""
    found = ast.parse(Path(transformer_engine.__file__).read_text())
    assert "softcap" not in ast.unparse(found)
    architecture = FAMILIES["Gemma2ForCausalLM"].architecture(tiny_config("gemma2"), "config.json")
    config: Any = SimpleNamespace(context_parallel_size=1)
    context: Any = SimpleNamespace(transformer_engine=True)
    with pytest.raises(UserError, match=r"attn_logit_softcapping = 1\.5, which .*; use an env"):
        build_model(
            architecture,
            None,  # type: ignore[arg-type]
            config,
            context=context,
            padded_vocab_size=97,
            max_sequence_length=64,
        )


@pytest.mark.parametrize(
    ("family", "fields", "what"),
    [
        ("mistral", {"sliding_window": 5}, "a sliding window of 5 positions"),
        ("gpt_oss", {}, "a sliding window of 6 positions and attention sinks"),
        ("gpt_oss", {"sliding_window": 256}, "attention sinks"),
    ],
)
def test_what_is_refused_where_keys_pass_between_ranks(
    family: str, fields: dict[str, Any], what: str
) -> None:
    """Transformer Engine has these under other kinds of context parallelism only."""
    (own,) = (one for one in FAMILIES.values() if one.model_type == family)
    architecture = own.architecture(tiny_config(family, **fields), "config.json")
    config: Any = SimpleNamespace(context_parallel_size=2)
    context: Any = SimpleNamespace(transformer_engine=True)
    with pytest.raises(
        UserError, match=f"context_parallel_size = 2, .* has {what}, which .*; give 1"
    ):
        build_model(
            architecture,
            None,  # type: ignore[arg-type]
            config,
            context=context,
            padded_vocab_size=97,
            max_sequence_length=64,
        )
