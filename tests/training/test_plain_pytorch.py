"""A step is what the same step in plain PyTorch over transformers' models is."""

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_oprd.config.schema import OutputLossConfig
from tests.distill.test_output_space import formula
from tests.helpers.closeness import assert_close_relative
from tests.helpers.pairs import fixed_rollouts, fixed_teacher_sequences, fixed_written, save_pair
from tests.helpers.ranks import run_ranks
from tests.helpers.selection import cases as as_parameters
from tests.helpers.selection import selected

PAIRS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama_tied": {"family": "llama", "tied": True},
    "qwen2_deeper": {"family": "qwen2", "teacher_layers": 7},
    "qwen3_deeper_tied": {"family": "qwen3", "teacher_layers": 7, "tied": True},
    "llama_shallower": {"family": "llama", "teacher_layers": 2},
    "qwen3_wider": {
        "family": "qwen3",
        "teacher_layers": 7,
        "tied": True,
        "teacher_fields": {"hidden_size": 48},
    },
    "granite_tied": {"family": "granite", "teacher_family": "exaone4", "tied": True},
    "olmo2": {"family": "olmo2", "teacher_family": "glm4"},
    "qwen2_moe": {"family": "qwen2_moe", "teacher_family": "mixtral"},
    "deepseek_v3": {"family": "deepseek_v3"},
    "glm4_moe": {"family": "glm4_moe"},
    "gemma3": {"family": "gemma3_text", "tied": True},
    "gemma2": {"family": "gemma2", "tied": True},
    "gpt_oss": {"family": "gpt_oss"},
    "biased": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen3_next": {"family": "qwen3_next", "rms_norm_eps": 0.01},
    "qwen3_moe": {"family": "qwen3_moe"},
    "qwen3_moe_raw": {"family": "qwen3_moe", "norm_topk_prob": False, "num_experts_per_tok": 3},
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One way to distil: as the run's settings say it, and as plain PyTorch needs it.

    ``matches`` are (student layer, teacher layer); ``first`` and ``last`` so many tokens of a
    response, ``shift`` from a token's own position. ``layer_weights`` are factors on the layers'
    losses; ``output`` is the output-space loss with its factor, over all response tokens.
    ``reading`` is what the teacher reads: a kind of `fixed_teacher_sequences`. ``projector`` are
    the widths of projectors that train, each with a GELU to the next. With ``gaps`` the student
    wrote `fixed_written` alone.
    the widths of projectors that train, each with a GELU to the next, ``lr_mult`` their learning
    rate in units of the student's.
    """

    pair: str
    overrides: list[str] = field(default_factory=list)
    matches: tuple[tuple[int, int], ...] = ((0, 0), (1, 1), (2, 2), (3, 3))
    first: int | None = None
    last: int | None = None
    shift: int = -1  # the predicting position
    unit_vectors: bool = False
    sequence_mean: bool = False
    pre_norm: bool = False
    coefficient: float = 1.0
    layer_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    output: tuple[OutputLossConfig, float] | None = None
    reading: str | None = None
    projector: tuple[int, ...] = ()
    gaps: bool = False
    lr_mult: float = 1.0


UNIT = ["loss.normalize=l2", "loss.coefficient=100"]
STEPS = {
    "default": Step(pair="llama"),
    "default_tied": Step(pair="llama_tied"),
    "post_norms": Step(pair="olmo2"),
    "shared_expert": Step(pair="qwen2_moe"),
    "latent": Step(pair="deepseek_v3"),
    "linear_attention": Step(pair="qwen3_next"),
    "sigmoid_router": Step(pair="glm4_moe"),
    "sinks": Step(pair="gpt_oss"),
    "zero_centered_norms": Step(pair="gemma3"),
    "biases": Step(pair="biased"),
    "deeper": Step(pair="qwen2_deeper", matches=((0, 0), (1, 2), (2, 4), (3, 6))),
    "deeper_tied": Step(pair="qwen3_deeper_tied", matches=((0, 0), (1, 2), (2, 4), (3, 6))),
    "several_student_layers_to_one": Step(
        pair="llama_shallower", matches=((0, 0), (1, 0), (2, 1), (3, 1))
    ),
    "l2_last_k_even_sequence_mean": Step(
        pair="llama",
        overrides=[
            *UNIT,
            "taps.layers=even",
            "taps.positions=last_k",
            "taps.k=3",
            "loss.aggregation=sequence_mean",
        ],
        matches=((0, 0), (2, 2)),
        last=3,
        unit_vectors=True,
        sequence_mean=True,
        coefficient=100.0,
    ),
    "predictor_pre_norm": Step(
        pair="llama_tied",
        overrides=["taps.last_layer=pre_norm"],
        pre_norm=True,
    ),
    "token": Step(pair="llama", overrides=["taps.alignment=token"], shift=0),
    "token_last_n": Step(
        pair="qwen2_deeper",
        overrides=["taps.alignment=token", "taps.layers=last_n", "taps.n=2"],
        matches=((2, 4), (3, 6)),
        shift=0,
    ),
    "first_k_odd": Step(
        pair="qwen3_deeper_tied",
        overrides=["taps.layers=odd", "taps.positions=first_k", "taps.k=2"],
        matches=((1, 2), (3, 6)),
        first=2,
    ),
    "last_position_of_last_layer": Step(
        pair="qwen2_deeper",
        overrides=["taps.layers=last", "taps.positions=last", *UNIT],
        matches=((3, 6),),
        last=1,
        unit_vectors=True,
        coefficient=100.0,
    ),
    "explicit": Step(
        pair="qwen2_deeper",
        overrides=["taps.layers=[0,2,3]", "taps.layer_map=[1,3,5]"],
        matches=((0, 1), (2, 3), (3, 5)),
    ),
    "explicit_crossing": Step(
        pair="qwen3_deeper_tied",
        overrides=["taps.layers=[0,1]", "taps.layer_map=[6,2]", "loss.coefficient=3"],
        matches=((0, 6), (1, 2)),
        coefficient=3.0,
    ),
    "layer_weights": Step(
        pair="llama",
        overrides=["loss.layer_weights=[0,1,0.5,2]"],
        layer_weights=(0.0, 1.0, 0.5, 2.0),
    ),
    # The coefficients of the first steps: half of each.
    "scheduled": Step(
        pair="llama",
        overrides=[
            "output_loss.kind=reverse_kl",
            "output_loss.coefficient_points=[[2,0.5],[4,1]]",
            "loss.coefficient=4",
            "loss.coefficient_points=[[3,0.5],[4,0]]",
        ],
        coefficient=2.0,
        output=(OutputLossConfig(kind="reverse_kl"), 0.5),
    ),
    "outputs_only": Step(
        pair="llama",
        overrides=["output_loss.kind=reverse_kl", "taps.layers=none"],
        matches=(),
        output=(OutputLossConfig(kind="reverse_kl"), 1.0),
    ),
    "multipliers_and_outputs": Step(
        pair="granite_tied",
        overrides=["output_loss.kind=reverse_kl"],
        output=(OutputLossConfig(kind="reverse_kl"), 1.0),
    ),
    "softcaps_and_outputs": Step(
        pair="gemma2",
        overrides=["output_loss.kind=reverse_kl"],
        output=(OutputLossConfig(kind="reverse_kl"), 1.0),
    ),
    "outputs_and_states": Step(
        pair="qwen3_deeper_tied",
        overrides=[
            "output_loss.kind=top_k",
            "output_loss.k=5",
            "output_loss.support=union",
            "loss.coefficient=10",
        ],
        matches=((0, 0), (1, 2), (2, 4), (3, 6)),
        coefficient=10.0,
        output=(OutputLossConfig(kind="top_k", k=5, support="union"), 1.0),
    ),
    "outputs_and_measured_states": Step(
        pair="llama_tied",
        overrides=[
            "output_loss.kind=sampled_token",
            "output_loss.coefficient=3",
            "loss.coefficient=0",
            "loss.aggregation=sequence_mean",
        ],
        coefficient=0.0,
        sequence_mean=True,
        output=(OutputLossConfig(kind="sampled_token"), 3.0),
    ),
    "outputs_of_experts": Step(
        pair="qwen3_moe",
        overrides=["output_loss.kind=jsd", "taps.layers=even"],
        matches=((0, 0), (2, 2)),
        output=(OutputLossConfig(kind="jsd"), 1.0),
    ),
    "other_prompt": Step(
        pair="llama",
        overrides=["output_loss.kind=forward_kl"],
        output=(OutputLossConfig(kind="forward_kl"), 1.0),
        reading="other_prompt",
    ),
    "other_tokens": Step(
        pair="qwen2_deeper",
        matches=((0, 0), (1, 2), (2, 4), (3, 6)),
        reading="other_tokens",
    ),
    "other_tokens_token": Step(
        pair="llama_tied",
        overrides=["taps.alignment=token"],
        shift=0,
        reading="other_tokens",
    ),
    "gaps": Step(pair="llama_tied", gaps=True),
    "gaps_token_last_k_sequence_mean": Step(
        pair="llama",
        overrides=[
            "taps.alignment=token",
            "taps.positions=last_k",
            "taps.k=3",
            "loss.aggregation=sequence_mean",
        ],
        last=3,
        shift=0,
        sequence_mean=True,
        gaps=True,
    ),
    "gaps_first_k_and_outputs": Step(
        pair="qwen2_deeper",
        overrides=["taps.positions=first_k", "taps.k=2", "output_loss.kind=sampled_token"],
        matches=((0, 0), (1, 2), (2, 4), (3, 6)),
        first=2,
        output=(OutputLossConfig(kind="sampled_token"), 1.0),
        gaps=True,
    ),
    "gaps_other_prompt": Step(
        pair="llama",
        overrides=["output_loss.kind=forward_kl"],
        output=(OutputLossConfig(kind="forward_kl"), 1.0),
        reading="other_prompt",
        gaps=True,
    ),
    "gaps_other_tokens": Step(pair="llama", reading="other_tokens", gaps=True),
    "gaps_other_tokens_token": Step(
        pair="llama_tied",
        overrides=["taps.alignment=token"],
        shift=0,
        reading="other_tokens",
        gaps=True,
    ),
    "projector_of_equal_widths": Step(
        pair="llama",
        overrides=["bridge.trainable=linear", "recompute.recompute_granularity=selective"],
        projector=(32, 32),
    ),
    "projector_to_a_wider_teacher": Step(
        pair="qwen3_wider",
        overrides=[*UNIT, "bridge.trainable=linear", "batch.micro_batch_size=2"],
        matches=((0, 0), (1, 2), (2, 4), (3, 6)),
        unit_vectors=True,
        coefficient=100.0,
        projector=(32, 48),
    ),
    "mlp_projector": Step(
        pair="llama",
        overrides=[
            "bridge.trainable=mlp",
            "bridge.hidden_size=20",
            "bridge.lr_mult=3",
            "taps.layers=even",
            "loss.aggregation=sequence_mean",
        ],
        matches=((0, 0), (2, 2)),
        sequence_mean=True,
        projector=(32, 20, 32),
        lr_mult=3.0,
    ),
    # LastOPD's recipe, in the middle of its crossfade.
    "mlp_projector_and_outputs": Step(
        pair="qwen3_wider",
        overrides=[
            "bridge.trainable=mlp",
            "taps.layers=last",
            "loss.normalize=l2",
            "loss.coefficient=1000",
            "loss.coefficient_points=[[4,0.5],[5,0]]",
            "output_loss.kind=top_k",
            "output_loss.coefficient_points=[[4,0.5],[5,1]]",
        ],
        matches=((3, 6),),
        unit_vectors=True,
        coefficient=500.0,
        output=(OutputLossConfig(kind="top_k"), 0.5),
        projector=(32, 48, 48),
    ),
    "mixture_of_experts": Step(pair="qwen3_moe"),
    "mixture_of_experts_raw": Step(pair="qwen3_moe_raw"),
}
# Combinations of what other steps have one by one.
NIGHTLY = (
    *("default_tied", "deeper", "token_last_n", "first_k_odd", "last_position_of_last_layer"),
    *("explicit", "layer_weights", "outputs_only", "outputs_and_measured_states"),
    *("other_tokens_token", "gaps_first_k_and_outputs", "gaps_other_prompt"),
    *("gaps_other_tokens_token", "mlp_projector", "mixture_of_experts_raw"),
)
ADAMW = [
    "optimizer.lr=1e-3",
    "optimizer.adam_eps=1e-4",  # large, so that rounding of tiny gradients does not count
    "optimizer.weight_decay=0.1",
    "optimizer.clip_grad=0.05",
    "optimizer.adam_beta1=0.8",
    "optimizer.adam_beta2=0.95",
    "optimizer.lr_warmup_fraction=0",
    "optimizer.lr_decay_style=constant",
]
SAME_TEACHER = {
    "same": [],
    "same_l2": [*UNIT, "batch.micro_batch_size=2"],
    "same_pre_norm": ["taps.last_layer=pre_norm", "recompute.recompute_granularity=selective"],
}


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the pairs, and the results of the cases that this run selected."""
    wanted = selected(request)
    root = tmp_path_factory.mktemp("plain")
    for name, settings in PAIRS.items():
        save_pair(root / name, **settings)
    cases = [
        {
            "name": name,
            "pair": str(root / step.pair),
            "overrides": [*step.overrides, *ADAMW],
            "reading": step.reading,
            "gaps": step.gaps,
        }
        for name, step in STEPS.items()
        if name in wanted
    ]
    student = f"model.teacher={root / 'llama' / 'student'}"
    cases += [
        {"name": name, "pair": str(root / "llama"), "overrides": [student, *overrides]}
        for name, overrides in SAME_TEACHER.items()
    ]
    cases += [
        {"name": f"other_{name}", "pair": str(root / "llama"), "overrides": overrides}
        for name, overrides in SAME_TEACHER.items()
    ]
    run_ranks("step", cases, 1, root)
    return root


def _output_loss(
    student: Any,
    teacher: Any,
    prompts: tuple[list[int], list[int]],
    response: list[int],
    written: list[bool],
    settings: OutputLossConfig,
) -> tuple[Tensor, Tensor]:
    """Summed over what the student wrote behind the models' prompts: the loss, and what is
    differentiated.
    """
    prompt, teacher_prompt = prompts
    tokens = torch.tensor([prompt + response])
    predicting = slice(len(prompt) - 1, -1)
    with torch.no_grad():
        read = torch.tensor([teacher_prompt + response])
        of_teacher = teacher(read).logits[0, len(teacher_prompt) - 1 : -1]
    value, surrogate = formula(
        student(tokens).logits[0, predicting], of_teacher, torch.tensor(response), settings
    )
    return value[written].sum().detach(), surrogate[written].sum()


def _hidden_states(model: Any, tokens: list[int], *, pre_norm: bool) -> list[Tensor]:
    """What each layer puts out for one sequence, [s, h] each; the last after the final norm."""
    raw: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(
        lambda _module, _inputs, output: raw.append(output[0])
    )
    output = model(torch.tensor([tokens]), output_hidden_states=True)
    states = [state[0] for state in output.hidden_states[1:]]  # [0] is the embedding
    hook.remove()
    return [*states[:-1], *raw] if pre_norm else states


def _forward_backward(
    student: Any, teacher: Any, step: Step, projectors: torch.nn.ModuleDict
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds to the gradients of the student and of ``projectors``, by student layer.

    Returns loss and cosine of each matched pair, and the output-space loss.
    """
    prompts, responses = fixed_rollouts()
    written = fixed_written() if step.gaps else [[True] * len(one) for one in responses]
    chosen = []
    for prompt, own in zip(prompts, written, strict=True):
        positions = [
            len(prompt) + step.shift + number for number, is_own in enumerate(own) if is_own
        ]
        positions = positions[: step.first] if step.first else positions
        positions = positions[-step.last :] if step.last else positions
        chosen.append([(position, position) for position in positions])
    read = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    teacher_prompts = prompts
    if step.reading is not None:
        others = fixed_teacher_sequences(step.reading)
        teacher_prompts = [list(one.prompt_ids) for one in others]
        read = [[*one.prompt_ids, *one.response_ids] for one in others]
        for number, (one, prompt) in enumerate(zip(others, prompts, strict=True)):
            pairs = list(one.pairs)
            if step.shift:  # tokens that start together: behind a pair, or behind the prompts
                ends = [(-1, -1), *pairs]
                pairs = [(s, t) for s, t in ends if s + 1 < len(responses[number])]
            pairs = [(s, t) for s, t in pairs if written[number][s - step.shift]]
            starts = len(prompt), len(one.prompt_ids)
            chosen[number] = [(starts[0] + s, starts[1] + t) for s, t in pairs]
    num_chosen = sum(len(positions) for positions in chosen)
    loss, cosine = torch.zeros(len(step.matches)), torch.zeros(len(step.matches))
    output_loss, total = torch.zeros(()), torch.zeros(())
    num_tokens = sum(map(sum, written))
    for number_of_sequence, pairs in enumerate(chosen):
        prompt, response = prompts[number_of_sequence], responses[number_of_sequence]
        positions = [position for position, _ in pairs]
        count = len(positions) * len(prompts) if step.sequence_mean else num_chosen
        of_student = _hidden_states(student, prompt + response, pre_norm=step.pre_norm)
        with torch.no_grad():
            of_teacher = _hidden_states(teacher, read[number_of_sequence], pre_norm=step.pre_norm)
        for number, (student_layer, teacher_layer) in enumerate(step.matches):
            s = of_student[student_layer][positions]
            t = of_teacher[teacher_layer][[position for _, position in pairs]]
            if step.projector:
                s = projectors[str(student_layer)](s)
            cosine[number] += F.cosine_similarity(s, t).sum().detach() / count
            if step.unit_vectors:
                s = s / s.norm(dim=1, keepdim=True)
                t = t / t.norm(dim=1, keepdim=True)
            loss[number] = loss[number] + ((s - t) ** 2).sum() / s.shape[1] / count
        if step.output is not None:
            settings, coefficient = step.output
            both = prompt, teacher_prompts[number_of_sequence]
            own = written[number_of_sequence]
            value, surrogate = _output_loss(student, teacher, both, response, own, settings)
            of_all = sum(own) * len(prompts) if step.sequence_mean else num_tokens
            output_loss += value / of_all
            total = total + coefficient * surrogate / of_all
    if step.matches:
        weights = torch.tensor(step.layer_weights[: len(step.matches)])
        total = total + step.coefficient * (weights * loss).mean()
    total.backward()
    return loss.detach(), cosine, output_loss


def _projectors(step: Step, initial: dict[str, Tensor]) -> torch.nn.ModuleDict:
    """Projectors in plain PyTorch, with given weights."""
    projectors = torch.nn.ModuleDict()
    for layer, _ in step.matches if step.projector else ():
        modules: list[torch.nn.Module] = []
        for width, next_width in itertools.pairwise(step.projector):
            modules += [torch.nn.Linear(width, next_width), torch.nn.GELU()]
        projectors[str(layer)] = torch.nn.Sequential(*modules[:-1])
    projectors.load_state_dict({n.removeprefix("projectors."): t for n, t in initial.items()})
    return projectors


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", as_parameters(STEPS, nightly=NIGHTLY))
def test_equals_plain_pytorch(results: Path, name: str) -> None:
    step = STEPS[name]
    found = torch.load(results / f"{name}.pt")
    student, teacher = (_load(results / step.pair / model) for model in ("student", "teacher"))

    projectors = _projectors(step, found["initial_projectors"])
    loss, cosine, output_loss = _forward_backward(student, teacher, step, projectors)
    assert_close_relative(found["output_loss"], output_loss, 1e-5)
    assert_close_relative(found["loss"], loss, 1e-5)
    assert_close_relative(found["cosine"], cosine, 1e-6, size=1.0)
    parameters = dict(student.named_parameters())
    gradients = _with_fused_experts(found["gradients"])
    # What transformers stores without training it: the biases of routers.
    biases = {name: one for name, one in student.named_buffers() if name in gradients}
    assert gradients.keys() == parameters.keys() | biases.keys()
    assert not any(gradients.pop(name).any() for name in biases)
    for parameter, gradient in gradients.items():
        expected = parameters[parameter].grad
        expected = torch.zeros_like(gradient) if expected is None else expected
        assert_close_relative(gradient, expected, 5e-5, what=parameter)
    of_projectors = {f"projectors.{name}": one for name, one in projectors.named_parameters()}
    assert found["projector_gradients"].keys() == of_projectors.keys()
    for name_of_one, gradient in found["projector_gradients"].items():
        assert_close_relative(gradient, of_projectors[name_of_one].grad, 5e-5, what=name_of_one)
    trained = [parameter for parameter in parameters.values() if parameter.grad is not None]
    assert 0 < len(trained) <= len(parameters)
    # Biases of stacked experts: of each expert a vector.
    vectors = {id(one) for name, one in parameters.items() if name.endswith("_bias")}
    groups = [
        {
            "params": [
                one for one in part if (one.dim() > 1 and id(one) not in vectors) == is_matrix
            ],
            "lr": lr,
            "weight_decay": 0.1 if is_matrix else 0.0,
        }
        for part, lr in ((trained, 1e-3), (of_projectors.values(), step.lr_mult * 1e-3))
        for is_matrix in (True, False)
    ]
    trained += of_projectors.values()
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-4)
    norms = [torch.nn.utils.clip_grad_norm_(trained, 0.05)]
    adamw.step()
    adamw.zero_grad()
    second_loss, _, second_output_loss = _forward_backward(student, teacher, step, projectors)
    norms.append(torch.nn.utils.clip_grad_norm_(trained, 0.05))
    adamw.step()
    assert_close_relative(found["second_loss"][:-1], second_loss, 1e-5)
    # The whole loss, coefficients included; nothing of the first step is in it.
    weights = torch.tensor(step.layer_weights[: len(step.matches)])
    whole = step.coefficient * (weights * second_loss).mean() if step.matches else 0.0
    whole = whole + (step.output[1] * second_output_loss if step.output is not None else 0.0)
    assert_close_relative(found["second_loss"][-1], whole, 1e-5)
    assert_close_relative(found["grad_norm"], torch.stack(norms), 5e-5)
    for parameter, weight in _with_fused_experts(found["weights"]).items():
        expected = parameters[parameter] if parameter in parameters else biases[parameter]
        assert_close_relative(weight, expected, 1e-5, what=parameter)
    for name_of_one, weight in found["projectors"].items():
        assert_close_relative(weight, of_projectors[name_of_one], 1e-5, what=name_of_one)


def _with_fused_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts stacked as in transformers' models: [e, gate and up, h] and [e, h, f]."""
    fused: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # GPT-OSS's are stacked already.
        if re.search(r"\.experts\.\d", name) is None:
            fused[name] = tensor
        elif ".experts.0.gate_proj" in name:
            experts = name.removesuffix("0.gate_proj.weight")
            of_experts = [
                [tensors[f"{experts}{expert}.{part}_proj.weight"] for expert in range(8)]
                for part in ("gate", "up", "down")
            ]
            gates, ups, downs = (torch.stack(part) for part in of_experts)
            fused[f"{experts}gate_up_proj"] = torch.cat([gates, ups], dim=1)
            fused[f"{experts}down_proj"] = downs
    return fused


@pytest.mark.parametrize("name", SAME_TEACHER)
def test_a_teacher_equal_to_the_student_teaches_nothing(results: Path, name: str) -> None:
    found = torch.load(results / f"{name}.pt")
    # Of what another teacher's are: squares of rounding, and rounding.
    other = torch.load(results / f"other_{name}.pt")
    assert float(found["loss"].max()) <= 1e-9 * float(other["loss"].min())
    assert_close_relative(found["cosine"], torch.ones_like(found["cosine"]), 1e-6)
    for parameter, gradient in found["gradients"].items():
        largest = float(other["gradients"][parameter].abs().max())
        assert float(gradient.abs().max()) <= 1e-4 * largest, parameter
