"""Softcaps against their formulas, written out in fp64 with torch's autograd."""

import math

import pytest
import torch
from torch import Tensor

from megatron_oprd.models import softcap
from megatron_oprd.models.logits import LogitForm
from megatron_oprd.models.softcap import softcapped_attention
from tests.helpers.closeness import assert_close_relative

S, ROWS, HEADS, GROUPS, DIM = 13, 2, 6, 3, 5
SCALE, CAP = 0.7, 1.5


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """One head, query and key at a time: [s, b, heads, dim]."""
    out = torch.zeros_like(query)
    for row in range(ROWS):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = SCALE * query[:, row, head] @ key[:, row, group].T
            scores = CAP * torch.tanh(scores / CAP)
            weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
            out[:, row, head] = weights @ value[:, row, group]
    return out


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(S, ROWS, heads, DIM, generator=generator, dtype=torch.float64)
        .mul(2)
        .requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


@pytest.mark.parametrize("block", [4, 13, 256])
@pytest.mark.parametrize("window", [None, 3])
def test_attention(monkeypatch: pytest.MonkeyPatch, block: int, window: int | None) -> None:
    """Values and gradients, in blocks that divide the queries and that do not."""
    monkeypatch.setattr(softcap, "BLOCK", block)
    query, key, value = inputs()
    behind = torch.arange(S)[:, None] - torch.arange(S)
    mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    given = None if window is None else mask
    found = softcapped_attention(query, key, value, given, scale=SCALE, cap=CAP)
    expected = formula(query, key, value, mask)
    assert_close_relative(found, expected, 1e-12)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    of_expected = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    (found * weights).sum().backward()
    for one, other in zip((query, key, value), of_expected, strict=True):
        assert_close_relative(one.grad, other, 1e-12)
    with torch.no_grad():
        again = softcapped_attention(query, key, value, given, scale=SCALE, cap=CAP)
    assert torch.equal(again, found)


def test_no_scores_are_kept() -> None:
    """What is saved for the backward pass are the inputs and nothing else."""
    query, key, value = inputs()
    saved: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        softcapped_attention(query, key, value, None, scale=SCALE, cap=CAP)
    assert saved == {one.untyped_storage().data_ptr() for one in (query, key, value)}


@pytest.mark.parametrize(
    "form",
    [
        LogitForm(),
        LogitForm(divisor=5.0),
        LogitForm(softcap=2.0),
        LogitForm(divisor=0.5, softcap=3.0),
    ],
)
def test_logits(form: LogitForm) -> None:
    output = torch.linspace(-9, 9, 40, dtype=torch.float64).view(4, 10).requires_grad_()
    expected = output / form.divisor
    if form.softcap is not None:
        expected = form.softcap * torch.tanh(expected / form.softcap)
    found = form.logits(output.detach().clone())
    assert_close_relative(found, expected, 1e-12)
    gradient = torch.linspace(1, 2, 40, dtype=torch.float64).view(4, 10)
    (of_output,) = torch.autograd.grad((expected * gradient).sum(), output)
    assert_close_relative(form.gradient_of_output(gradient.clone(), found), of_output, 1e-12)
