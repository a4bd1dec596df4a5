import numpy as np
import pytest
import torch

from megatron_oprd.distill.projectors import Projectors, project_student, project_teacher
from megatron_oprd.distill.representation import compare
from tests.distill.test_representation import golden_case
from tests.helpers.closeness import assert_close_relative


@pytest.mark.parametrize("selection", ["all.0", "last_k.5"])
def test_values_of_the_reference_implementation(selection: str) -> None:
    case, tensors = golden_case("c2")
    chosen = tensors[f"mask.{selection}"] != 0
    losses, cosines = [], []
    for layer, teacher_layer in enumerate(case["layer_map_0based"]):
        p_t, mu_t = tensors["bridge.P_T"][layer], tensors["bridge.mu_T"][layer]
        projectors = Projectors(
            student={layer: tensors["bridge.P_S"][layer]},
            teacher={teacher_layer: p_t},
            mean={teacher_layer: mu_t},
        )
        states = projectors.project_student(layer, tensors["student"][:, layer])
        targets = projectors.project_teacher(teacher_layer, tensors["teacher"][:, teacher_layer])
        found = compare(states[chosen], targets[chosen], normalize="l2")
        losses.append(found.distance.mean())
        cosines.append(found.cosine.mean())
    for values, key, size in (
        (losses, "bridge_l2_normalized_mse", None),
        (cosines, "bridge_cosine", 0.1),  # 1e-6 of a cosine's own size, which is 1
    ):
        expected = case[f"{key}.{selection}"]
        assert_close_relative(torch.stack(values).mean(), expected, 1e-5, size=size, what=key)


def test_loss_is_the_formula() -> None:
    """|| z_S / |z_S| - z_T / |z_T| ||^2 / r, and its gradient P_S^T (...) written out."""
    draw = np.random.default_rng(0)
    p_s, p_t, mu = draw.normal(size=(3, 5)), draw.normal(size=(3, 7)), draw.normal(size=7)
    h_s, h_t = draw.normal(size=(4, 5)), draw.normal(size=(4, 7))

    z_s, z_t = h_s @ p_s.T, (h_t - mu) @ p_t.T
    norm = np.linalg.norm(z_s, axis=1, keepdims=True)
    u_s, u_t = z_s / norm, z_t / np.linalg.norm(z_t, axis=1, keepdims=True)
    # d|u_s - u_t|^2/dz_s = -2 (u_t - (u_s.u_t) u_s) / |z_s|
    along = (u_s * u_t).sum(axis=1, keepdims=True)
    expected = -2 / 3 * (u_t - along * u_s) / norm @ p_s

    found = compare(
        project_student(torch.tensor(h_s), torch.tensor(p_s)),
        project_teacher(torch.tensor(h_t), torch.tensor(p_t), torch.tensor(mu)),
        normalize="l2",
    )
    assert found.distance.tolist() == pytest.approx(((u_s - u_t) ** 2).sum(axis=1) / 3, rel=1e-12)
    assert_close_relative(found.gradient @ torch.tensor(p_s), expected, 1e-12)


def test_states_are_projected_in_the_projectors_dtype() -> None:
    hidden = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    found = project_student(hidden, weight)
    assert found.dtype == torch.float32
    assert_close_relative(found, hidden.float() @ weight.t(), 1e-6)
    assert project_teacher(hidden, weight, torch.zeros(5)).dtype == torch.float32
