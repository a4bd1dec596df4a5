"""Each loss against its formula on whole logits in fp64, with autograd's gradient."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_oprd.config.schema import OutputLossConfig
from megatron_oprd.distill.output_space import VocabularyShard, forward_kl, jsd, reverse_kl
from tests.helpers.closeness import assert_close_relative
from tests.helpers.ranks import run_ranks

VOCAB_SIZE, PADDED, POSITIONS = 29, 32, 7
TEMPERATURES = {"student_temperature": 0.7, "teacher_temperature": 1.3}
TOP_K = [
    {"kind": "top_k", "k": k, "support": support, "support_weights": weights}
    for k in (1, 5)
    for support in ("only_stu", "only_tch", "intersection", "union")
    for weights in ("student_p", "teacher_p", "none")
]
SETTINGS: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in ("sampled_token", "reverse_kl", "forward_kl", "jsd")},
    "jsd_0.1": {"kind": "jsd", "beta": 0.1},
    **{"_".join(map(str, one.values())): one for one in TOP_K},
    "whole_vocabulary": {"kind": "top_k", "k": VOCAB_SIZE},
    "temperatures": {"kind": "reverse_kl", **TEMPERATURES},
    "temperatures_top_k": {"kind": "top_k", "k": 5, "support": "union", **TEMPERATURES},
    **{
        f"reference_{support}_{weights}": {
            "kind": "top_k",
            "k": 5,
            "support": support,
            "support_weights": weights,
            "top_k_variant": "reference",
        }
        for support, weights in (
            ("only_stu", "student_p"),
            ("union", "teacher_p"),
            ("intersection", "none"),
        )
    },
    "temperatures_sampled": {"kind": "sampled_token", **TEMPERATURES},
}

# A vocabulary that leaves the last of four ranks without a column.
SMALL_VOCAB = 22
SMALL: dict[str, dict[str, Any]] = {
    "small": {"kind": "reverse_kl"},
    "small_k": {"kind": "top_k", "k": 9},
}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Both models' logits [n, PADDED] in fp64, of which the padding is huge, and tokens [n]."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        3 * torch.randn(POSITIONS, PADDED, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    for logits in (student, teacher):
        logits[:, VOCAB_SIZE:] = 1e6
    return student, teacher, torch.randint(VOCAB_SIZE, (POSITIONS,), generator=generator)


def formula(
    student: Tensor, teacher: Tensor, labels: Tensor, settings: OutputLossConfig
) -> tuple[Tensor, Tensor]:
    """Values, and what is differentiated, of [n, VOCAB_SIZE] logits."""
    log_p = (student / settings.student_temperature).log_softmax(dim=1)
    log_q = (teacher / settings.teacher_temperature).log_softmax(dim=1)
    p, q = log_p.exp(), log_q.exp()
    if settings.kind == "reverse_kl":
        value = (p * (log_p - log_q)).sum(dim=1)
        return value, value
    if settings.kind == "forward_kl":
        value = (q * (log_q - log_p)).sum(dim=1)
        return value, value
    if settings.kind == "jsd":
        log_m = (settings.beta * q + (1 - settings.beta) * p).log()
        value = settings.beta * (q * (log_q - log_m)).sum(dim=1)
        value = value + (1 - settings.beta) * (p * (log_p - log_m)).sum(dim=1)
        return value, value
    if settings.kind == "sampled_token":
        rows = torch.arange(len(labels))
        value = (log_p - log_q)[rows, labels]
        return value, value.detach() * log_p[rows, labels]
    values, surrogates = [], []
    for log_p_row, log_q_row in zip(log_p, log_q, strict=True):
        ours = set(log_p_row.topk(settings.k).indices.tolist())
        theirs = set(log_q_row.topk(settings.k).indices.tolist())
        chosen = {
            "only_stu": ours,
            "only_tch": theirs,
            "intersection": ours & theirs,
            "union": ours | theirs,
        }[settings.support]
        ids = sorted(chosen)
        log_p_s, log_q_s = log_p_row[ids].log_softmax(dim=0), log_q_row[ids].log_softmax(dim=0)
        w = {
            "student_p": log_p_s.exp(),
            "teacher_p": log_q_s.exp(),
            "none": torch.full_like(log_p_s, 1 / max(len(ids), 1)),
        }[settings.support_weights]
        if settings.top_k_variant == "reference":
            advantages = -(w * (log_p_row - log_q_row)[ids]).detach()
            values.append(-advantages.sum())
            surrogates.append(-(advantages * log_p_row[ids]).sum())
            continue
        values.append((w * (log_p_s - log_q_s)).sum())
        # With the student's weights the renormalised KL itself is differentiated.
        policy_gradient = ((w * (log_p_s - log_q_s)).detach() * log_p_s).sum()
        surrogates.append(
            values[-1] if settings.support_weights == "student_p" else policy_gradient
        )
    return torch.stack(values), torch.stack(surrogates)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of every loss."""
    root = tmp_path_factory.mktemp("output_space")
    losses = [
        {"name": name, "settings": settings, "vocab_size": VOCAB_SIZE}
        for name, settings in SETTINGS.items()
    ]
    losses += [
        {"name": name, "settings": settings, "vocab_size": SMALL_VOCAB}
        for name, settings in SMALL.items()
    ]
    losses.append(losses[0] | {"name": "bf16", "dtype": "bfloat16"})
    for ranks in (1, 2, 4):
        run_ranks("output_space", [{"losses": losses}], ranks, root / str(ranks))
    return root


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", [*SETTINGS, *SMALL])
def test_values_and_gradients(results: Path, name: str, ranks: int) -> None:
    found = torch.load(results / str(ranks) / f"{name}.pt")
    vocab_size = SMALL_VOCAB if name in SMALL else VOCAB_SIZE
    given = (SETTINGS | SMALL)[name]
    student, teacher, labels = inputs()
    student = student[:, :vocab_size].requires_grad_()
    labels = labels % vocab_size
    value, surrogate = formula(student, teacher[:, :vocab_size], labels, OutputLossConfig(**given))
    (gradient,) = torch.autograd.grad(surrogate.sum(), student)
    assert found["value"].dtype == found["gradient"].dtype == torch.float64
    assert_close_relative(found["value"], value, 1e-12)
    assert_close_relative(found["gradient"], gradient, 1e-12)


def test_the_sampled_gradient_is_the_full_one_in_expectation(results: Path) -> None:
    """Over all tokens, each as often as the student samples it."""
    student, teacher, _ = inputs()
    student, teacher = student[:, :VOCAB_SIZE].requires_grad_(), teacher[:, :VOCAB_SIZE]
    p = student.softmax(dim=1).detach()
    sampled = OutputLossConfig(kind="sampled_token")
    expectation = torch.zeros(())
    for token in range(VOCAB_SIZE):
        labels = torch.full((POSITIONS,), token)
        _, surrogate = formula(student, teacher, labels, sampled)
        expectation = expectation + (p[:, token] * surrogate).sum()
    (in_expectation,) = torch.autograd.grad(expectation, student)
    found = torch.load(results / "1" / "reverse_kl.pt")["gradient"]
    assert_close_relative(found, in_expectation, 1e-10)


@pytest.mark.parametrize("limit", [1e-10, 1 - 1e-10])
def test_the_limits_of_jsd(limit: float) -> None:
    """Scaled, they are forward KL (beta to 0) and reverse KL (beta to 1)."""
    group: Any = SimpleNamespace(size=lambda: 1)
    shard = VocabularyShard(start=0, size=VOCAB_SIZE, group=group)
    log_p, log_q = (one[:, :VOCAB_SIZE].log_softmax(dim=1) for one in inputs()[:2])
    found = jsd(log_p, log_q, shard, beta=limit)
    expected = (forward_kl if limit < 0.5 else reverse_kl)(log_p, log_q, shard)
    torch.testing.assert_close(
        found.value / min(limit, 1 - limit), expected.value, rtol=1e-4, atol=0
    )


def test_logits_of_low_precision_are_compared_in_fp32(results: Path) -> None:
    found = torch.load(results / "1" / "bf16.pt")
    assert found["value"].dtype == found["gradient"].dtype == torch.float32
    assert math.isfinite(float(found["value"].sum()))
