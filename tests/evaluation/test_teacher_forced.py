import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from megatron_oprd.distill.layer_map import LayerPair, layer_pairs
from megatron_oprd.evaluation.teacher_forced import (
    Continuation,
    TeacherForcedMeasures,
    teacher_continuations,
    teacher_forced_measures,
)
from tests.helpers.tiny import save_tiny_model, tiny_config

pytestmark = pytest.mark.long


def tiny_model(
    folder: Path, family: str, seed: int, num_layers: int, dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    save_tiny_model(folder, tiny_config(family, num_hidden_layers=num_layers), seed)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def random_prompts(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    return [
        tuple(torch.randint(5, 97, (length,), generator=generator).tolist()) for length in lengths
    ]


def sequences_of(prompt_and_response_lengths: Sequence[tuple[int, int]]) -> list[Continuation]:
    prompts = random_prompts([p for p, _ in prompt_and_response_lengths])
    responses = random_prompts([r + 1 for _, r in prompt_and_response_lengths])
    return [
        Continuation(prompt_ids=p, response_ids=r[1:])
        for p, r in zip(prompts, responses, strict=True)
    ]


SEQUENCES = sequences_of([(4, 3), (9, 1), (1, 8), (6, 6), (2, 5)])
PAIRS = layer_pairs("all", "proportional", num_student_layers=3, num_teacher_layers=4)


def one_by_one(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sequences: Sequence[Continuation],
    pairs: Sequence[LayerPair],
) -> dict[str, float]:
    """The measures by hooks on the blocks, one sequence and one position at a time."""

    def run(model: PreTrainedModel, ids: list[int]) -> tuple[list[Tensor], Tensor]:
        outputs: list[Tensor] = []
        modules = [*model.model.layers[:-1], model.model.norm]
        hooks = [m.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for m in modules]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        for hook in hooks:
            hook.remove()
        return [h[0] for h in outputs], logits

    cosines: dict[int, list[float]] = {pair.student: [] for pair in pairs}
    agreements, reverse, forward, student_nll, teacher_nll = [], [], [], [], []
    for sequence in sequences:
        ids = [*sequence.prompt_ids, *sequence.response_ids]
        h_s, logits_s = run(student, ids)
        h_t, logits_t = run(teacher, ids)
        for position in range(len(sequence.prompt_ids), len(ids)):
            for pair in pairs:
                a, b = h_s[pair.student][position], h_t[pair.teacher][position]
                cosines[pair.student].append(float(a @ b / (a @ a).sqrt() / (b @ b).sqrt()))
            p, q = logits_s[position - 1].softmax(-1), logits_t[position - 1].softmax(-1)
            agreements.append(float(p.argmax() == q.argmax()))
            reverse.append(sum(float(x * (x / y).log()) for x, y in zip(p, q, strict=True)))
            forward.append(sum(float(y * (y / x).log()) for x, y in zip(p, q, strict=True)))
            student_nll.append(-math.log(p[ids[position]]))
            teacher_nll.append(-math.log(q[ids[position]]))

    def mean(values: list[float]) -> float:
        return sum(values) / max(1, len(values))

    per_layer = {f"cosine {layer}": mean(values) for layer, values in cosines.items()}
    return per_layer | {
        "cosine": mean(list(per_layer.values())),
        "top1_agreement": mean(agreements),
        "reverse_kl": mean(reverse),
        "forward_kl": mean(forward),
        "student_perplexity": math.exp(mean(student_nll)),
        "teacher_perplexity": math.exp(mean(teacher_nll)),
    }


def flat(measures: TeacherForcedMeasures) -> dict[str, float]:
    values = dataclasses.asdict(measures)
    per_layer = {f"cosine {k}": v for k, v in values.pop("cosine_per_layer").items()}
    return per_layer | {k: v for k, v in values.items() if not k.startswith("num_")}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_measures_equal_a_plain_loop(tmp_path: Path, family: str) -> None:
    student = tiny_model(tmp_path / "student", family, seed=1, num_layers=3)
    teacher = tiny_model(tmp_path / "teacher", family, seed=2, num_layers=4)
    # Near enough to agree at some positions and not at others.
    weights = teacher.state_dict()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.lerp_(weights[name], 0.8)

    expected = one_by_one(student, teacher, SEQUENCES, PAIRS)
    measures = teacher_forced_measures(student, teacher, SEQUENCES, PAIRS, batch_size=3)

    assert flat(measures) == pytest.approx(expected, rel=1e-9)
    assert measures.num_sequences == 5
    assert measures.num_positions == 23
    assert 0 < measures.top1_agreement < 1


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batching_does_not_change_the_measures(
    tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_model(tmp_path / "student", "llama", seed=1, num_layers=3)
    teacher = tiny_model(tmp_path / "teacher", "llama", seed=2, num_layers=4)
    expected = teacher_forced_measures(student, teacher, SEQUENCES[::-1], PAIRS, batch_size=3)
    monkeypatch.setattr("megatron_oprd.evaluation.teacher_forced.ROWS", 2)
    measures = teacher_forced_measures(student, teacher, SEQUENCES, PAIRS, batch_size=batch_size)
    assert flat(measures) == pytest.approx(flat(expected), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_equals_itself(tmp_path: Path, dtype: torch.dtype) -> None:
    teacher = tiny_model(tmp_path, "qwen3", seed=2, num_layers=4, dtype=dtype)
    pairs = layer_pairs("all", "proportional", num_student_layers=4, num_teacher_layers=4)
    measures = teacher_forced_measures(teacher, teacher, SEQUENCES, pairs)
    assert measures.top1_agreement == 1
    assert measures.reverse_kl == measures.forward_kl == 0
    assert measures.student_perplexity == measures.teacher_perplexity
    assert list(measures.cosine_per_layer.values()) == pytest.approx([1.0] * 4, rel=1e-5)
    assert measures.cosine == pytest.approx(1.0, rel=1e-5)


def test_both_divergences_are_positive_and_differ(tmp_path: Path) -> None:
    student = tiny_model(tmp_path / "student", "llama", seed=1, num_layers=4)
    teacher = tiny_model(tmp_path / "teacher", "llama", seed=2, num_layers=4)
    pairs = [LayerPair(student=3, teacher=3)]
    there = teacher_forced_measures(student, teacher, SEQUENCES, pairs)
    back = teacher_forced_measures(teacher, student, SEQUENCES, pairs)
    assert there.reverse_kl > 0
    assert there.reverse_kl == pytest.approx(back.forward_kl)
    assert there.reverse_kl != pytest.approx(there.forward_kl, rel=1e-3)


def test_models_of_two_widths(tmp_path: Path) -> None:
    """Distributions are compared as those of models of one width; hidden states are not."""
    narrow = tiny_model(tmp_path / "a", "llama", seed=1, num_layers=3)
    save_tiny_model(tmp_path / "b", tiny_config("llama", hidden_size=64), seed=2)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float64)
    measures = flat(teacher_forced_measures(narrow, wide, SEQUENCES, []))
    assert measures.pop("cosine") is None
    expected = one_by_one(narrow, wide, SEQUENCES, [])
    assert measures == pytest.approx({name: expected[name] for name in measures}, rel=1e-9)


def test_measures_become_json(tmp_path: Path) -> None:
    student = tiny_model(tmp_path / "student", "llama", seed=1, num_layers=3)
    teacher = tiny_model(tmp_path / "teacher", "llama", seed=2, num_layers=4)
    measures = teacher_forced_measures(student, teacher, SEQUENCES, PAIRS)
    written = json.loads(json.dumps(dataclasses.asdict(measures)))
    assert TeacherForcedMeasures(**written) == measures
    assert list(measures.cosine_per_layer) == ["0", "1", "2"]


def greedy_without_cache(
    model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int, ends: set[int]
) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_continuations_are_greedy(tmp_path: Path, batch_size: int) -> None:
    teacher = tiny_model(tmp_path, "qwen2", seed=2, num_layers=4)
    prompts = random_prompts([7, 2, 1, 12, 5])
    free = [greedy_without_cache(teacher, p, 10, set()) for p in prompts]
    ends = {free[0][5], free[4][2]}
    # A penalty would change these tokens; what the generation config asks for must not matter.
    teacher.generation_config = GenerationConfig(eos_token_id=5, repetition_penalty=5.0)

    continuations = teacher_continuations(
        teacher, prompts, eos_token_ids=ends, max_new_tokens=10, batch_size=batch_size
    )

    expected = [greedy_without_cache(teacher, p, 10, ends) for p in prompts]
    assert [c.prompt_ids for c in continuations] == prompts
    assert [c.response_ids for c in continuations] == expected
    assert {len(response) for response in expected} == {3, 4, 6, 10}


def test_mistakes(tmp_path: Path) -> None:
    narrow = tiny_model(tmp_path / "a", "llama", seed=1, num_layers=3)
    save_tiny_model(tmp_path / "b", tiny_config("llama", hidden_size=64), seed=2)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="student's hidden_size is 32, the teacher's 64"):
        teacher_forced_measures(narrow, wide, SEQUENCES, PAIRS)
    with pytest.raises(ValueError, match="nothing to compare: no sequences"):
        teacher_forced_measures(narrow, narrow, [], PAIRS)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        teacher_continuations(narrow, [[5]], eos_token_ids=[], max_new_tokens=0)
    with pytest.raises(ValueError, match="a prompt without tokens"):
        teacher_continuations(narrow, [[5], []], eos_token_ids=[], max_new_tokens=1)
