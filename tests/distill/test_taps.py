"""Selections, and taps on stand-ins for a model's layers; real models are in the layout tests."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_oprd.data.batching import (
    LossWeights,
    MicroBatch,
    ModelInput,
    TeacherReading,
    collate,
    teacher_batches,
    with_teacher,
)
from megatron_oprd.distill.layer_map import LayerPair
from megatron_oprd.distill.projectors import Projectors
from megatron_oprd.distill.taps import RankSelector, Selection, Taps
from tests.helpers.closeness import assert_close_relative

S, B, H = 8, 3, 5


def micro_batch(index: int, *, seed: int = 0) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(B, S, generator=generator)
    weights[weights < 0.6] = 0
    return MicroBatch(
        index=index,
        input=ModelInput(
            tokens=torch.zeros(B, S, dtype=torch.int64),
            position_ids=torch.arange(S).expand(B, S),
            num_tokens=B * S,
        ),
        labels=torch.zeros(B, S, dtype=torch.int64),
        weights=LossWeights(states=weights, outputs=None),
    )


def states_of(micro_batch: MicroBatch) -> Tensor:
    assert micro_batch.weights is not None
    return micro_batch.weights.states


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_slices_of_the_sequence_select_each_position_once(tp_size: int) -> None:
    batch = micro_batch(3)
    hidden = torch.randn(S, B, H)
    expected = {
        tuple(hidden[s, b].tolist()): float(states_of(batch)[b, s])
        for s in range(S)
        for b in range(B)
        if states_of(batch)[b, s] > 0
    }
    found: list[tuple[tuple[float, ...], float]] = []
    # [s, b, h] --> [s/tp, b, h], as sequence parallelism splits it
    for tp_rank, local in enumerate(hidden.split(S // tp_size)):
        selection = Selection.of(batch, tp_rank=tp_rank, tp_size=tp_size)
        assert (selection.micro_batch, selection.index.dtype) == (3, torch.int64)
        rows = local.flatten(0, 1)[selection.index]
        assert selection.weights is not None
        found += [
            (tuple(row), weight)
            for row, weight in zip(rows.tolist(), selection.weights.tolist(), strict=True)
        ]
    assert len(found) == len(expected) > B
    assert dict(found) == expected


def test_a_slice_without_supervised_positions_is_empty() -> None:
    batch = micro_batch(0)
    states_of(batch)[:, : S // 2] = 0
    selection = Selection.of(batch, tp_rank=0, tp_size=2)
    assert selection.weights is not None
    assert selection.index.shape == selection.weights.shape == (0,)


@pytest.mark.parametrize("is_packed", [False, True])
def test_each_micro_batch_gets_its_own_rows_of_a_larger_one(is_packed: bool) -> None:
    """As states both models have the tokens, so that a target is the student's own row."""
    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(1, 1000, (length,), generator=generator).tolist()
        for length in (17, 9, 12, 14)
    ]
    weights = [torch.rand(len(one), generator=generator).round() for one in sequences]
    positions = [torch.where(one > 0, torch.arange(len(one)), -1) for one in weights]
    rows: dict[str, Any] = {
        "is_packed": is_packed,
        "pad_to_multiple_of": 4,
        "device": torch.device("cpu"),
    }
    batches = [[1, 3], [2], [0]]
    micro_batches = with_teacher(
        collate(batches, sequences, weights, **rows),
        batches,
        TeacherReading(sequences=sequences, positions=positions, output_positions=None),
        together=[[2, 0], [1]],
        **rows,
    )

    def states(read: ModelInput) -> Tensor:
        return read.tokens.t().float()[..., None]  # [s, b, 1]

    chunk, selector = model(1), RankSelector(tp_rank=0, tp_size=1, group=None)
    taps = taps_on(chunk, model(2), post_norm=False)
    for batch in teacher_batches(micro_batches):
        chosen = [selector.select(one, for_teacher=True) for one in batch.members]
        assert all(read is batch.input for read, _ in chosen)
        taps.begin(*(selection for _, selection in chosen))
        chunk.decoder.layers[0].tap(states(batch.input))
    for one in micro_batches:
        read, selection = selector.select(one, for_teacher=False)
        found = taps._take_target(0, selection.micro_batch)
        assert torch.equal(found, states(read).flatten(0, 1)[selection.index])
        assert len(found) > 0


class Layer(nn.Module):
    """A linear layer with a place for a tap, as the project's transformer layers have."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number = number
        self.linear = nn.Linear(H, H)
        self.tap: Callable[[Tensor], Tensor] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        out = hidden + self.linear(hidden)
        return out if self.tap is None else self.tap(out)


def model(seed: int, *, depth: int = 2) -> Any:
    torch.manual_seed(seed)
    layers = nn.ModuleList(Layer(number + 1) for number in range(depth))
    return SimpleNamespace(decoder=SimpleNamespace(layers=layers, final_layernorm=nn.LayerNorm(H)))


def run(chunk: Any, hidden: Tensor, *, recompute: bool = False) -> list[Tensor]:
    """Every layer's output, then the final norm's."""
    outputs = []
    for layer in chunk.decoder.layers:
        hidden = checkpoint(layer, hidden, use_reentrant=True) if recompute else layer(hidden)
        outputs.append(hidden)
    return [*outputs, chunk.decoder.final_layernorm(hidden)]


def taps_on(teacher: Any, student: Any, *, post_norm: bool, coefficient: float = 1.0) -> Taps:
    taps = Taps(
        [LayerPair(0, 0), LayerPair(1, 1)],
        normalize="none",
        post_norm=post_norm,
        device=torch.device("cpu"),
    )
    taps.coefficients = [coefficient / 2] * 2
    taps.attach_teacher([teacher], depth=2)
    taps.attach_student([student], depth=2)
    return taps


def gradients(chunk: Any) -> list[Tensor]:
    return [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for module in (chunk.decoder.layers, chunk.decoder.final_layernorm)
        for parameter in module.parameters()
    ]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("post_norm", [False, True])
def test_attached_gradients_and_metrics_are_the_formulas(post_norm: bool, recompute: bool) -> None:
    batches = [micro_batch(0, seed=1), micro_batch(1, seed=2)]
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(S, B, H, generator=generator).requires_grad_() for _ in batches]
    teacher, student, plain = model(1), model(2), model(2)
    with torch.no_grad():
        targets = [run(teacher, x) for x in inputs]
    which = (0, 2 if post_norm else 1)

    # The loss written out: mean over layers of the weighted mean over d of squared differences.
    losses, cosines = torch.zeros(2), torch.zeros(2)
    for batch, x, target in zip(batches, inputs, targets, strict=True):
        outputs = run(plain, x)
        for number, i in enumerate(which):
            weights = states_of(batch).t()  # [s, b]
            losses[number] += (weights * (outputs[i] - target[i]).square().sum(-1) / H).sum()
            cosine = torch.cosine_similarity(outputs[i], target[i], dim=-1)
            cosines[number] += (weights * cosine).sum().detach()
    (7.0 * losses.mean()).backward()

    taps = taps_on(teacher, student, post_norm=post_norm, coefficient=7.0)
    selections = [Selection.of(batch, tp_rank=0, tp_size=1) for batch in batches]
    for selection, x in zip(selections, inputs, strict=True):
        taps.begin(selection)
        with torch.no_grad():
            run(teacher, x)
    # Forward passes run ahead of the backward passes, as on a pipeline stage.
    ends = []
    for selection, x, target in zip(selections, inputs, targets, strict=True):
        taps.begin(selection)
        outputs = run(student, x, recompute=recompute)
        with torch.no_grad():
            for one, other in zip(outputs, run(plain, x), strict=True):
                assert_close_relative(one, other, 1e-6, what="a tap changes no value")
        assert len(target) == len(outputs)
        ends.append(outputs[-1].sum() * 0)
    for end in ends:
        end.backward()

    loss, cosine = taps.end_step()
    assert_close_relative(loss, losses, 1e-5)
    assert_close_relative(
        cosine, cosines, 1e-5, size=sum(float(states_of(batch).sum()) for batch in batches)
    )
    for one, other in zip(gradients(student), gradients(plain), strict=True):
        assert_close_relative(one, other, 1e-5)


def test_gradients_through_a_bridge_are_the_formulas() -> None:
    """Targets are kept as r numbers; the projectors stay as they are."""
    batch, generator = micro_batch(0, seed=1), torch.Generator().manual_seed(4)
    x = torch.randn(S, B, H, generator=generator).requires_grad_()
    teacher, student, plain = model(1), model(2), model(2)
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> dict[int, Tensor]:
        return {layer: torch.randn(shape, generator=generator) for layer in (0, 1)}

    projectors = Projectors(student=draw(3, H), teacher=draw(3, H), mean=draw(H))
    before = [one.clone() for group in vars(projectors).values() for one in group.values()]

    losses, cosines = torch.zeros(2), torch.zeros(2)
    with torch.no_grad():
        targets = run(teacher, x)
    for i, states in enumerate(run(plain, x)[:2]):
        z_s = states @ projectors.student[i].t()
        z_t = (targets[i] - projectors.mean[i]) @ projectors.teacher[i].t()
        cosine = torch.cosine_similarity(z_s, z_t, dim=-1)  # [s, b]
        # Of unit vectors, || u - v ||^2 / r = 2 (1 - cos) / r.
        losses[i] = (states_of(batch).t() * 2 * (1 - cosine) / 3).sum()
        cosines[i] = (states_of(batch).t() * cosine).sum().detach()
    (10 * losses.mean()).backward()

    taps = Taps(
        [LayerPair(0, 0), LayerPair(1, 1)],
        normalize="l2",
        post_norm=False,
        device=torch.device("cpu"),
        projectors=projectors,
    )
    taps.coefficients = [5.0, 5.0]
    taps.attach_teacher([teacher], depth=2)
    taps.attach_student([student], depth=2)
    taps.begin(Selection.of(batch, tp_rank=0, tp_size=1))
    with torch.no_grad():
        run(teacher, x)
    assert {target.shape[1] for target in taps.targets} == {3}
    (run(student, x)[1].sum() * 0).backward()

    loss, cosine = taps.end_step()
    assert_close_relative(loss, losses, 1e-5)
    assert_close_relative(cosine, cosines, 1e-5, size=float(states_of(batch).sum()))
    for one, other in zip(gradients(student), gradients(plain), strict=True):
        assert_close_relative(one, other, 1e-5)
    after = [one for group in vars(projectors).values() for one in group.values()]
    assert all(torch.equal(*both) for both in zip(before, after, strict=True))


def test_metrics_start_at_zero_every_step() -> None:
    teacher, student = model(1), model(2)
    taps = taps_on(teacher, student, post_norm=True)
    results = []
    for _ in range(2):
        taps.begin(Selection.of(micro_batch(0), tp_rank=0, tp_size=1))
        x = torch.ones(S, B, H, requires_grad=True)
        with torch.no_grad():
            run(teacher, x)
        run(student, x)[-1].sum().backward()
        results.append(torch.stack(taps.end_step()))
    assert torch.equal(*results)
    assert results[0].count_nonzero() == 4


def test_a_recomputed_layer_that_never_ran_again_is_noticed() -> None:
    teacher, student = model(1), model(2)
    taps = taps_on(teacher, student, post_norm=False)
    taps.begin(Selection.of(micro_batch(0), tp_rank=0, tp_size=1))
    with torch.no_grad():
        run(student, torch.ones(S, B, H))
    with pytest.raises(AssertionError, match="not run again"):
        taps.end_step()
