import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_oprd.distill.representation import (
    compare,
    masked_cosine,
    masked_mse,
    token_cosine,
    token_mse,
)
from tests.helpers.closeness import assert_close_relative

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SELECTIONS = ["all.0", "last.0", "last_k.5", "first_k.7", "last_k.100"]


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
    mask = tensors[f"mask.{selection}"]
    layers = range(student.shape[1])

    l2 = [masked_mse(student[:, i], teacher[:, i], mask, normalize="l2") for i in layers]
    plain = [masked_mse(student[:, i], teacher[:, i], mask, normalize="none") for i in layers]
    cosine = [masked_cosine(student[:, i], teacher[:, i], mask) for i in layers]

    assert_close_relative(l2, case[f"l2_normalized_mse_per_layer.{selection}"], 1e-5)
    for measured, key, size in (
        (l2, "l2_normalized_mse", None),
        (plain, "mse", None),
        (cosine, "cosine", 0.1),  # 1e-6 of a cosine's own size, which is 1
    ):
        expected = case[f"{key}.{selection}"]
        assert_close_relative(torch.stack(measured).mean(), expected, 1e-5, size=size, what=key)


def hidden_states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    student = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64).to(dtype)
    teacher = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]])
    return student, teacher, mask


def mse_written_out(student: Tensor, teacher: Tensor, mask: Tensor, normalize: str) -> float:
    total, count = 0.0, 0
    for index in np.argwhere(mask.numpy() != 0):
        h_s, h_t = student[tuple(index)].numpy(), teacher[tuple(index)].numpy()
        if normalize == "l2":
            h_s, h_t = h_s / np.sqrt(np.sum(h_s**2)), h_t / np.sqrt(np.sum(h_t**2))
        total += np.sum((h_s - h_t) ** 2) / len(h_s)
        count += 1
    return total / count


@pytest.mark.parametrize("normalize", ["none", "l2"])
def test_mse_is_the_formula(normalize: Any) -> None:
    student, teacher, mask = hidden_states()
    value = masked_mse(student, teacher, mask, normalize=normalize)
    assert value.item() == pytest.approx(
        mse_written_out(student, teacher, mask, normalize), rel=1e-13
    )


def test_cosine_is_the_formula() -> None:
    student, teacher, mask = hidden_states()
    cosines = [
        s @ t / np.sqrt((s @ s) * (t @ t))
        for s, t in zip(student[mask != 0].numpy(), teacher[mask != 0].numpy(), strict=True)
    ]
    assert masked_cosine(student, teacher, mask).item() == pytest.approx(
        np.mean(cosines), abs=1e-13
    )
    assert token_cosine(2 * teacher, teacher).numpy() == pytest.approx(1.0)
    assert token_cosine(-teacher, teacher).numpy() == pytest.approx(-1.0)


def test_gradient_of_plain_mse_is_the_formula() -> None:
    student, teacher, mask = hidden_states()
    student.requires_grad_()
    masked_mse(student, teacher, mask, normalize="none").backward()
    expected = 2 * (student.detach() - teacher) * mask[..., None] / (mask.sum() * student.shape[-1])
    torch.testing.assert_close(student.grad, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalize", ["none", "l2"])
def test_gradients_by_finite_differences(normalize: Any) -> None:
    student, teacher, mask = hidden_states()
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: masked_mse(h, teacher, mask, normalize=normalize), (student,)
    )
    assert torch.autograd.gradcheck(
        lambda h: token_mse(h, teacher, normalize=normalize), (student,)
    )
    assert torch.autograd.gradcheck(lambda h: masked_cosine(h, teacher, mask), (student,))


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, mask = hidden_states()
    student.requires_grad_()
    teacher.requires_grad_()
    for value in (
        masked_mse(student, teacher, mask, normalize="none"),
        masked_mse(student, teacher, mask, normalize="l2"),
        masked_cosine(student, teacher, mask),
    ):
        value.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_half_precision_is_compared_in_fp32() -> None:
    student, teacher, mask = hidden_states(torch.bfloat16)
    exact = mse_written_out(student.double(), teacher.double(), mask, "none")
    value = masked_mse(student, teacher, mask, normalize="none")
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact, rel=1e-5)
    assert token_cosine(student, teacher).dtype == torch.float32
    assert token_cosine(student.double(), teacher).dtype == torch.float64


def test_mask_dtype_does_not_matter() -> None:
    student, teacher, mask = hidden_states()
    values = {
        masked_mse(student, teacher, mask.to(dtype), normalize="none").item()
        for dtype in (torch.bool, torch.long, torch.float32, torch.bfloat16)
    }
    assert len(values) == 1


def test_what_is_not_selected_takes_no_part() -> None:
    student, teacher, mask = hidden_states()
    expected = masked_mse(student, teacher, mask, normalize="l2")
    student[mask == 0] = torch.nan
    teacher[mask == 0] = torch.inf
    student.requires_grad_()
    value = masked_mse(student, teacher, mask, normalize="l2")
    value.backward()
    assert value.item() == expected.item()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert (student.grad[mask == 0] == 0).all()


@pytest.mark.parametrize("normalize", ["none", "l2"])
def test_nothing_selected_is_zero_with_a_zero_gradient(normalize: Any) -> None:
    student, teacher, mask = hidden_states()
    student.requires_grad_()
    loss = masked_mse(student, teacher, mask * 0, normalize=normalize)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert (student.grad == 0).all()
    assert masked_cosine(student, teacher, mask * 0).item() == 0


def test_errors_name_what_is_wrong() -> None:
    student, teacher, mask = hidden_states()
    with pytest.raises(ValueError, match="'layer'; it must be one of: none, l2"):
        masked_mse(student, teacher, mask, normalize="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"student \(3, 5, 6\) and teacher \(3, 5, 1\)"):
        token_mse(student, teacher[..., :1], normalize="none")
    with pytest.raises(ValueError, match=r"mask \(3, 1\) must have the shape of student"):
        masked_cosine(student, teacher, mask[:, :1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", ["none", "l2"])
def test_the_closed_form_is_autograds(normalize: Any, dtype: torch.dtype) -> None:
    student, teacher, _ = (tensor.flatten(0, -2) for tensor in hidden_states(dtype))
    student[3] = 0.0
    teacher[4] = 0.0
    student[5] = teacher[5]
    wide = torch.promote_types(dtype, torch.float32)
    leaf = student.to(wide).requires_grad_()
    distance = token_mse(leaf, teacher, normalize=normalize)
    (gradient,) = torch.autograd.grad(distance.sum(), leaf)
    found = compare(student, teacher, normalize=normalize)
    assert found.distance.dtype == found.gradient.dtype == found.cosine.dtype == wide
    tolerance = 1e-12 if wide == torch.float64 else 1e-5
    # A row of zeros has a gradient of 3e11, beside which the others are nothing.
    ordinary = [row for row in range(len(student)) if row != 3]
    for value, expected in (
        (found.distance, distance.detach()),
        (found.cosine, token_cosine(student, teacher)),
        (found.gradient, gradient),
    ):
        for rows in (ordinary, [3]):
            assert_close_relative(value[rows], expected[rows], tolerance)
    assert float(found.distance[5]) == float(found.gradient[5].abs().max()) == 0.0


def test_the_wider_dtype_of_both_counts() -> None:
    student, teacher, _ = (tensor.flatten(0, -2) for tensor in hidden_states(torch.float64))
    assert compare(student.float(), teacher, normalize="none").distance.dtype == torch.float64
    assert token_mse(student.float(), teacher, normalize="l2").dtype == torch.float64
