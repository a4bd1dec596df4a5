"""The cases of the self-test, in order of worth, for the ranks that there are."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_oprd.rollout.registry import ENGINES
from megatron_oprd.selftest.cases import Case

_TP2, _PP2, _CP2, _EP2 = (
    f"parallel.{name}_parallel_size=2"
    for name in ("tensor_model", "pipeline_model", "context", "expert_model")
)
_TP2_SP = [_TP2, "parallel.sequence_parallel=true"]
_VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
_ETP1 = "parallel.expert_tensor_parallel_size=1"
_MBS1, _MBS2 = "batch.micro_batch_size=1", "batch.micro_batch_size=2"
_PACKED = ["batch.sequence_packing=true", "batch.max_tokens=48"]
_FULL = [
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=uniform",
    "recompute.recompute_num_layers=1",
]
_OVERLAP = ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]
_BF16 = "model.params_dtype=bf16"
_FP8 = "teacher.precision=fp8"

_UNFUSED = ["model.apply_rope_fusion=false", "optimizer.gradient_accumulation_fusion=false"]

# Name -> (ranks, settings).
_LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "packed": (1, _PACKED),
    "full recompute": (1, [_MBS2, *_FULL]),
    "TP 2": (2, [*_TP2_SP, _MBS2]),
    "PP 2": (2, [_PP2, _MBS2]),
    "PP 2, VPP 2, full recompute": (2, [_PP2, _VPP2, _MBS1, *_FULL]),
    "CP 2": (2, [_CP2, _MBS2]),
    "DP 2, overlap": (2, [_MBS1, *_OVERLAP]),
    "TP 2, packed": (2, [*_TP2_SP, *_PACKED]),
    "TP 2, PP 2, full recompute": (4, [*_TP2_SP, _PP2, _MBS1, *_FULL]),
    "CP 2, TP 2": (4, [_CP2, *_TP2_SP, _MBS2]),
    "DP 2, PP 2, overlap": (4, [_PP2, _MBS1, *_OVERLAP]),
}
_IN_BF16 = ("packed", "TP 2", "PP 2, VPP 2, full recompute", "CP 2", "DP 2, overlap", "CP 2, TP 2")
_EXPERT_LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "micro-batches of 1": (1, [_MBS1]),
    "EP 2": (2, [_EP2, _MBS2]),
    "TP 2, ETP 1, EP 2": (2, [*_TP2_SP, _ETP1, _EP2, _MBS2]),
    "EP 2, PP 2": (4, [_EP2, _PP2, _MBS2]),
}
_FP8_LAYOUTS = ("TP 2", "PP 2", "TP 2, PP 2, full recompute")
# Relative, of float32 without TF32; of bf16, where a layout changes what is rounded; and with a
# teacher whose scales belong to a rank's part of a weight.
_FP32 = {
    "loss": 1e-4,
    "gradients": 2e-3,
    "gradient norm": 1e-3,
    "update": 2e-3,
    "loss of the second step": 1e-3,
}
_ROUNDED = {"loss": 3e-2, "gradients": 0.1, "gradient norm": 5e-2, "loss of the second step": 5e-2}
# A teacher in FP8 against one in bf16: a wrong scale makes another teacher of it.
_OTHER_PRECISION = {"loss": 0.1}
_IN_BF16_PART = "layouts, bf16"
_TORCH_RECIPES = ("per_channel_log", "block_128")
_ENGINE_RECIPES = ("tensorwise", "blockwise", "mxfp8")


def cases(num_ranks: int, *, has_gpu: bool) -> list[Case]:
    """All cases that ``num_ranks`` ranks can run, with the most valuable parts first."""
    layouts = dict(_LAYOUTS)
    if has_gpu:
        # Transformer Engine's kernels against torch's; without a GPU there is nothing fused.
        layouts["nothing fused"] = (1, [_MBS2, *_UNFUSED])
    found = [
        Case(part="versions", name="installed packages", kind="versions", num_ranks=1),
        Case(
            part="fabric",
            name="all ranks",
            kind="fabric",
            num_ranks=num_ranks,
            arguments={"mib": 256 if has_gpu else 16},
        ),
        *_steps("layouts, fp32", "dense", [], layouts, _FP32),
        *_steps("layouts, experts", "experts", [], _EXPERT_LAYOUTS, _FP32),
        *_steps(_IN_BF16_PART, "dense", [_BF16], _named(_IN_BF16), _ROUNDED),
        *_resumes(),
        *_rollouts(has_gpu=has_gpu),
        *_speed(num_ranks),
    ]
    for recipe in (*_TORCH_RECIPES, *(_ENGINE_RECIPES if has_gpu else ())):
        overrides = [_BF16, _FP8, f"teacher.fp8_recipe={recipe}"]
        found += _steps(
            f"FP8 teacher, {recipe}",
            "dense",
            overrides,
            _named(_FP8_LAYOUTS),
            _ROUNDED,
            compared_with=_IN_BF16_PART,
        )
    return [one for one in found if one.num_ranks <= num_ranks]


def chosen(every: Sequence[Case], parts: Sequence[str]) -> list[Case]:
    """The cases of parts whose names begin so, with those that they are compared with."""
    found = {(one.part, one.name) for one in every if one.part.startswith(tuple(parts))}
    if any(part.startswith("FP8") for part, _ in found):
        found.add((_IN_BF16_PART, "one rank"))
    return [one for one in every if (one.part, one.name) in found]


def _named(names: tuple[str, ...]) -> dict[str, tuple[int, list[str]]]:
    return {name: _LAYOUTS[name] for name in names}


def _steps(
    part: str,
    pair: str,
    overrides: list[str],
    layouts: dict[str, tuple[int, list[str]]],
    tolerances: dict[str, float],
    *,
    compared_with: str | None = None,
) -> Iterator[Case]:
    """A step on one rank, and the same in other layouts.

    The one rank's is compared with that of the part ``compared_with``, in another precision.
    """
    rounding = {"compared_with": compared_with, "tolerances": _OTHER_PRECISION}
    every: dict[str, tuple[int, list[str], dict[str, Any]]] = {
        "one rank": (1, [], {"saved_as": part, **rounding}),
        **{
            name: (*layout, {"saved_as": None, "compared_with": part, "tolerances": tolerances})
            for name, layout in layouts.items()
        },
    }
    for name, (num_ranks, settings, compared) in every.items():
        yield Case(
            part=part,
            name=name,
            kind="steps",
            num_ranks=num_ranks,
            arguments={"pair": pair, "overrides": [*overrides, *settings], **compared},
        )


def _resumes() -> Iterator[Case]:
    """A run of two ranks or one that is stopped, and goes on in other layouts."""
    for name, num_ranks, settings in (
        ("one rank", 1, []),
        ("DP 2", 2, []),
        ("TP 2", 2, _TP2_SP),
        ("PP 2, VPP 2", 2, [_PP2, _VPP2]),
        ("TP 2, PP 2", 4, [*_TP2_SP, _PP2]),
    ):
        yield Case(
            part="resume",
            name=name,
            kind="resume",
            num_ranks=num_ranks,
            arguments={"overrides": settings, "is_reference": name == "one rank"},
            seconds=120,
        )


def _rollouts(*, has_gpu: bool) -> Iterator[Case]:
    """Each engine in a process of its own, with a GPU in all its trials."""
    for kind in ENGINES.values():
        if not kind.has_processes:
            continue
        for name, settings in kind.trials.items() if has_gpu else [("one engine", ())]:
            yield Case(
                part=f"rollouts, {kind.title}",
                name=name,
                kind="rollouts",
                num_ranks=1,
                arguments={
                    "overrides": [f"rollout.engine={kind.name}", *settings]
                    + ([_BF16] if has_gpu else [])
                },
                seconds=300,
            )


def _speed(num_ranks: int) -> Iterator[Case]:
    yield Case(part="speed", name="a step, DP", kind="speed", num_ranks=num_ranks, seconds=180)
