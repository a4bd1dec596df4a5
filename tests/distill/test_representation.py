import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from megatron_oprd.distill.representation import compare, token_cosine
from tests.helpers.closeness import assert_close_relative

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SELECTIONS = ["all.0", "last.0", "last_k.5", "first_k.7", "last_k.100"]
NORMALIZE = ("none", "l2")


def golden_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values = json.loads((GOLDEN / "oprd_reference.json").read_text())
    tensors = load_file(GOLDEN / "oprd_reference.safetensors")
    case = next(case for case in values["cases"] if case["name"] == name)
    return case, {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(name)}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", ["c0", "c1"])
def test_values_of_the_reference_implementation(name: str, selection: str) -> None:
    case, tensors = golden_case(name)
    student, teacher = tensors["student"], tensors["teacher"][:, case["layer_map_0based"]]
    chosen = tensors[f"mask.{selection}"] != 0
    layers = range(student.shape[1])
    l2, plain = (
        [compare(student[:, i][chosen], teacher[:, i][chosen], normalize=kind) for i in layers]
        for kind in ("l2", "none")
    )

    of_layers = torch.stack([one.distance.mean() for one in l2])
    assert_close_relative(of_layers, case[f"l2_normalized_mse_per_layer.{selection}"], 1e-5)
    for measured, key, size in (
        ([one.distance.mean() for one in l2], "l2_normalized_mse", None),
        ([one.distance.mean() for one in plain], "mse", None),
        ([one.cosine.mean() for one in plain], "cosine", 0.1),  # 1e-6 of a cosine's size, 1
    ):
        expected = case[f"{key}.{selection}"]
        assert_close_relative(torch.stack(measured).mean(), expected, 1e-5, size=size, what=key)


def hidden_states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return tuple(  # type: ignore[return-value]
        torch.randn(15, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )


def with_autograd(student: Tensor, teacher: Tensor, normalize: str) -> Tensor:
    """The distance of each pair, in a graph."""
    if normalize == "l2":
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return (student - teacher).square().mean(dim=-1)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_distance_and_cosine_are_the_formulas(normalize: Any) -> None:
    student, teacher = hidden_states()
    found = compare(student, teacher, normalize=normalize)
    for row, (h_s, h_t) in enumerate(zip(student.numpy(), teacher.numpy(), strict=True)):
        cosine = h_s @ h_t / np.sqrt((h_s @ h_s) * (h_t @ h_t))
        if normalize == "l2":
            h_s, h_t = h_s / np.sqrt(np.sum(h_s**2)), h_t / np.sqrt(np.sum(h_t**2))
        assert float(found.distance[row]) == pytest.approx(
            np.sum((h_s - h_t) ** 2) / len(h_s), rel=1e-13
        )
        assert float(found.cosine[row]) == pytest.approx(cosine, abs=1e-13)
        assert float(token_cosine(student, teacher)[row]) == pytest.approx(cosine, abs=1e-13)


def test_cosines_of_equal_and_of_opposite_vectors() -> None:
    _, teacher = hidden_states()
    assert token_cosine(2 * teacher, teacher).numpy() == pytest.approx(1.0)
    assert token_cosine(-teacher, teacher).numpy() == pytest.approx(-1.0)
    assert float(token_cosine(0 * teacher, teacher).abs().max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_the_closed_form_is_autograds(normalize: Any, dtype: torch.dtype) -> None:
    student, teacher = hidden_states(dtype)
    student[3] = 0.0
    teacher[4] = 0.0
    student[5] = teacher[5]
    wide = torch.promote_types(dtype, torch.float32)
    leaf = student.to(wide).requires_grad_()
    distance = with_autograd(leaf, teacher.to(wide), normalize)
    (gradient,) = torch.autograd.grad(distance.sum(), leaf)
    found = compare(student, teacher, normalize=normalize)
    assert found.distance.dtype == found.gradient.dtype == found.cosine.dtype == wide
    tolerance = 1e-12 if wide == torch.float64 else 1e-5
    # A row of zeros has a gradient of 3e11, beside which the others are nothing.
    ordinary = [row for row in range(len(student)) if row != 3]
    for value, expected in (
        (found.distance, distance.detach()),
        (found.cosine, F.cosine_similarity(student.to(wide), teacher.to(wide))),
        (found.gradient, gradient),
    ):
        for rows in (ordinary, [3]):
            assert_close_relative(value[rows], expected[rows], tolerance)
    assert float(found.distance[5]) == float(found.gradient[5].abs().max()) == 0.0


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_no_graph_is_kept(normalize: Any) -> None:
    student, teacher = (states.requires_grad_() for states in hidden_states())
    found = compare(student, teacher, normalize=normalize)
    assert not any(value.requires_grad for value in (found.distance, found.cosine, found.gradient))


def test_the_wider_dtype_of_both_counts() -> None:
    student, teacher = hidden_states()
    assert compare(student.float(), teacher, normalize="none").distance.dtype == torch.float64
    assert compare(student, teacher.float(), normalize="l2").distance.dtype == torch.float64
    assert token_cosine(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_no_vectors_at_all() -> None:
    student, teacher = (states[:0] for states in hidden_states())
    assert compare(student, teacher, normalize="l2").gradient.shape == (0, 6)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_one_graph_for_any_number_of_rows(normalize: Any) -> None:
    """torch.compile traces it without a break; kernels are made of that graph."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(compare, dynamic=True, fullgraph=True, backend=count)
    for rows in (15, 9, 4):
        student, teacher = (states[:rows] for states in hidden_states(torch.bfloat16))
        found = compiled(student, teacher, normalize=normalize)
        expected = compare(student, teacher, normalize=normalize)
        for name in ("distance", "cosine", "gradient"):
            assert_close_relative(getattr(found, name), getattr(expected, name), 1e-6, what=name)
    assert len(graphs) < 3  # and not one for each number


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="kernels for a CPU need a C++ compiler")
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_the_compiled_kernel_is_the_formula(normalize: Any) -> None:
    torch._dynamo.reset()  # it compiles a function anew eight times at most
    compiled = torch.compile(compare, dynamic=True, fullgraph=True)
    for rows in (15, 1, 0):
        student, teacher = (states[:rows] for states in hidden_states(torch.bfloat16))
        found = compiled(student, teacher, normalize=normalize)
        expected = compare(student, teacher, normalize=normalize)
        for name in ("distance", "cosine", "gradient"):
            assert_close_relative(getattr(found, name), getattr(expected, name), 1e-5, what=name)


def test_errors_name_what_is_wrong() -> None:
    student, teacher = hidden_states()
    with pytest.raises(ValueError, match="'layer'; it must be one of: none, l2"):
        compare(student, teacher, normalize="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"student \(15, 6\) and teacher \(15, 1\)"):
        compare(student, teacher[..., :1], normalize="none")
