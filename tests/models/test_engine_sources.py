"""What is needed of megatron-core and Transformer Engine, looked up in their sources.

Transformer Engine cannot be installed where there is no CUDA, but its wheel on PyPI holds the
Python sources: ``make transformer-engine`` fetches it, 0.7 MB. More wheels beside it are checked
as well. docs/gpu-checks.md says how to check the rest.
"""

import ast
import inspect
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from megatron.core import fp8_utils
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_block

from megatron_oprd.models.fp8_transformer_engine import RECIPES
from tests.helpers.ranks import ROOT

WHEELS = sorted((ROOT / ".cache/transformer_engine").glob("transformer_engine-*.whl"))
pytestmark = pytest.mark.skipif(
    not WHEELS, reason="no wheel of Transformer Engine: make transformer-engine fetches one"
)
MEGATRON = {
    module: ast.parse(Path(module.__file__).read_text())
    for module in (fp8_utils, transformer_block)
    if module.__file__ is not None
}


class Sources:
    """The Python sources of a wheel."""

    def __init__(self, wheel: Path) -> None:
        self._archive = zipfile.ZipFile(wheel)

    def has(self, path: str) -> bool:
        """Whether there is a file below transformer_engine/."""
        return f"transformer_engine/{path}" in self._archive.namelist()

    def close(self) -> None:
        self._archive.close()

    def module(self, path: str) -> ast.Module:
        """The syntax tree of a file below transformer_engine/."""
        return ast.parse(self._archive.read(f"transformer_engine/{path}"))


@pytest.fixture(params=WHEELS, ids=lambda wheel: wheel.name.split("-")[1])
def engine(request: pytest.FixtureRequest) -> Iterator[Sources]:
    sources = Sources(request.param)
    yield sources
    sources.close()


def definition(tree: ast.AST, name: str) -> ast.FunctionDef | ast.ClassDef:
    """The only function or class of that name, wherever it is nested."""
    (found,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
    )
    return found


def arguments(function: ast.AST) -> list[str]:
    assert isinstance(function, ast.FunctionDef)
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]


def imported(tree: ast.Module) -> dict[str, str]:
    """Imported name -> the module that it comes from."""
    return {
        alias.asname or alias.name: node.module or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def text(node: ast.AST) -> str:
    """Source without line breaks and comments."""
    return ast.unparse(node)


def test_availability(engine: Sources) -> None:
    names = imported(engine.module("pytorch/__init__.py"))
    tree = engine.module("pytorch/quantization.py")
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for function in RECIPES.values():
        assert names[function] == "transformer_engine.pytorch.quantization"
        assert arguments(functions[function]) == ["return_reason"]


def test_contexts_that_megatron_enters(engine: Sources) -> None:
    tree = engine.module("pytorch/quantization.py")
    assert {"enabled", "fp8_recipe", "fp8_group"} <= set(
        arguments(definition(tree, "fp8_autocast"))
    )
    init = arguments(definition(tree, "fp8_model_init"))
    assert {"enabled", "recipe", "preserve_high_precision_init_val"} <= set(init)
    recipes = engine.module("common/recipe/__init__.py")
    for name in ("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"):
        assert isinstance(definition(recipes, name), ast.ClassDef)


def test_a_frozen_weight_has_no_second_copy(engine: Sources) -> None:
    """Built without grad, it has no column-wise data; Megatron then keeps no bf16 copy either."""
    reset = definition(engine.module("pytorch/module/base.py"), "reset_parameters")
    assert "quantizer.set_usage(rowwise=True, columnwise=torch.is_grad_enabled())" in text(reset)
    (context,) = (
        node
        for node in ast.walk(MEGATRON[fp8_utils])
        if isinstance(node, ast.FunctionDef)
        and node.name == "get_fp8_context"
        and "is_first_last_bf16_layer" in text(node)
    )
    assert "['preserve_high_precision_init_val'] = torch.is_grad_enabled()" in text(context)
    build = definition(MEGATRON[transformer_block], "_build_layers")
    assert "get_fp8_context(layer_config, global_layer_number - 1, is_init=True)" in text(build)


def test_loading_rounds_a_whole_weight(engine: Sources) -> None:
    """copy_ on an FP8 weight rounds; the weight passes for a tensor of Megatron's check."""
    home = imported(engine.module("pytorch/tensor/__init__.py"))["QuantizedTensor"]
    folder = "pytorch/tensor" if engine.has("pytorch/tensor/quantized_tensor.py") else "pytorch"
    weight = definition(engine.module(f"{folder}/{home}.py"), "QuantizedTensor")
    dispatch = text(definition(weight, "__torch_dispatch__"))
    assert "func == torch.ops.aten.copy_.default" in dispatch
    assert "dst.quantize_(src)" in dispatch
    assert "FP8_TENSOR_CLASS" in text(definition(MEGATRON[fp8_utils], "is_float8tensor"))
    assert imported(MEGATRON[fp8_utils])["FP8_TENSOR_CLASS"]


@pytest.mark.parametrize("kind", ["float8", "mxfp8", "float8_blockwise"])
def test_what_a_weight_consists_of(engine: Sources, kind: str) -> None:
    tree = engine.module(f"pytorch/tensor/storage/{kind}_tensor_storage.py")
    metadata = text(definition(tree, "get_metadata"))
    for part in ("data", "scale_inv"):
        assert f"{part}'" in metadata


def test_multiples_of_tokens_and_widths(engine: Sources) -> None:
    products = text(definition(engine.module("pytorch/utils.py"), "assert_dim_for_fp8_exec"))
    # Megatron, too, takes 16 for both (get_fp8_align_size).
    assert re.search(r"prod\(tensor.shape\[:-1\]\) % 8 .* tensor.shape\[-1\] % 16 ", products)
    constants = text(engine.module("pytorch/constants.py"))
    assert "MXFP8_BLOCK_SCALING_SIZE = 32" in constants
    blocks = definition(
        engine.module("pytorch/tensor/float8_blockwise_tensor.py"), "is_quantizable"
    )
    assert "shape[-1] % self.block_len != 0" in text(blocks)
    assert "shape[:-1]) % self.block_len != 0" in text(blocks)


@pytest.mark.parametrize("module", ["linear", "layernorm_linear", "grouped_linear"])
def test_gradients_are_added_to_the_buffers(engine: Sources, module: str) -> None:
    tree = engine.module(f"pytorch/module/{module}.py")
    name = {"linear": "Linear", "layernorm_linear": "LayerNormLinear"}.get(module, "GroupedLinear")
    forward = text(definition(definition(tree, name), "forward"))
    # Read at each pass, so that it can be set on a module that was built without.
    assert "self.fuse_wgrad_accumulation" in forward
    backward = text(tree)
    assert "grad_added_to_main_grad = True" in backward
    # Without `is_first_microbatch`, which Megatron gives only with a cache of transposed weights.
    assert "accumulate_wgrad_into_param_main_grad = ctx.fuse_wgrad_accumulation" in backward


def test_fused_rotation(engine: Sources) -> None:
    rotate = definition(engine.module("pytorch/attention/rope.py"), "apply_rotary_pos_emb")
    assert {"t", "freqs", "tensor_format", "interleaved", "fused"} <= set(arguments(rotate))


@pytest.mark.parametrize("linear", [ColumnParallelLinear, RowParallelLinear])
def test_seam_of_megatrons_linear_layers(linear: type) -> None:
    forward_impl = vars(linear)["_forward_impl"]
    assert list(inspect.signature(forward_impl).parameters) == ["self", "input", "weight", "args",
                                                                "kwargs"]  # fmt: skip
    assert "self._forward_impl(" in inspect.getsource(vars(linear)["forward"])
