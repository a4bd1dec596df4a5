"""What is refused: ranges and effects, as the schema declares them, and relations of settings."""

import keyword
import math
import re
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

from megatron_oprd.config.checks import check_values
from megatron_oprd.config.load import load_config
from megatron_oprd.config.schema import DataConfig, ExtraTeacherConfig, ModelConfig, RunConfig
from megatron_oprd.config.setting import Found, Rules, When, settings_of, shown
from megatron_oprd.errors import UserError

SETTINGS: dict[str, Any] = {
    "output_dir": "run",
    "model": {"student": "s", "teacher": "t"},
    "data": {"prompts": ["p.jsonl"]},
}
ALL = {found.key: found for found in settings_of(RunConfig(extra_teachers=[ExtraTeacherConfig()]))}
TP2, SP = "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"
DISTRIBUTE = "recompute.distribute_saved_activations=true"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
FULL = "recompute.recompute_granularity=full"
METHOD, LAYERS = "recompute.recompute_method=block", "recompute.recompute_num_layers=1"
VLLM = "rollout.engine=vllm"
FP8 = "rollout.vllm.quantization=fp8_per_channel"
SPLIT = "rollout.vllm.tensor_model_parallel_size=2"
SERVER = "rollout.vllm.servers=[http://10.0.0.1:8000]"
START = "rollout.vllm.start_servers=1"
NODES = "rollout.vllm.server_nodes=[0,2]"
OWN_PROMPT = "teacher_prompt.privileged_key=a"
# Settings that a setting needs and that are no condition of its rules.
RELATED: dict[str, dict[str, Any]] = {
    "teacher.max_tokens": {"batch.max_tokens": 1},
    "parallel.virtual_pipeline_model_parallel_size": {"parallel.pipeline_model_parallel_size": 2},
    "recompute.recompute_num_layers": {"recompute.recompute_method": "block"},
    "recompute.recompute_method": {"recompute.recompute_num_layers": 1},
    "bridge.path": {"loss.normalize": "l2"},
    "ride.base": {"ride.lambda": 2.0},
    "bridge.rank": {"loss.normalize": "l2"},
    "evaluation.interval": {"evaluation.data": ["a.parquet"]},
    "taps.n": {"taps.layers": "last_n"},
    "profile.start": {"profile.end": 2},
    "profile.end": {"profile.start": 0},
    "export.push_to_hub": {"export.hub_model_id": "user/name"},
    "export.hub_private_repo": {"export.hub_model_id": "user/name"},
    "extra_teachers[0].n": {"extra_teachers[0].layers": "last_n"},
    "rollout.vllm.tensor_model_parallel_size": {"rollout.vllm.start_servers": 1},
    "rollout.vllm.max_model_len": {"data.max_prompt_tokens": 1, "rollout.max_new_tokens": 1},
}
# Values that differ from the default, of the settings of which a condition wants no certain value.
GIVEN: dict[str, Any] = {
    "extra_teachers": [ExtraTeacherConfig(model="m")],
    "teacher.refresh_interval": 1,
    "teacher_prompt.privileged_key": "a",
    "teacher_prompt.template": "{prompt}, {privileged}",
    "bridge.path": "b",
    "ride.base": "b",
    "teacher.when": {"source": "x"},
    "loss.coefficient_points": [[0.0, 1.0]],
    "output_loss.coefficient_points": [[0.0, 1.0]],
    "rollout.function": "a:b",
    "rollout.oversample": 0.5,
    "rollout.logprob_check_interval": 1,
    "rollout.vllm.servers": ["http://10.0.0.1:8000"],
    "rollout.vllm.start_servers": 1,
    "trackers": ["wandb"],
    "export.push_to_hub": True,
    "profile.start": 0,
}


def load(folder: Path, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return load_config(path, overrides)


def refused(folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(folder, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def check(settings: dict[str, Any]) -> None:
    config = RunConfig(
        output_dir="run",
        model=ModelConfig(student="s", teacher="t"),
        data=DataConfig(prompts=["p.jsonl"]),
    )
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        if group == "extra_teachers[0]":
            before = (*config.extra_teachers, ExtraTeacherConfig(model="m"))[0]
            config.extra_teachers = [replace(before, **{name: value})]
        else:
            setattr(attrgetter(group)(config) if group else config, field_name(name), value)
    check_values(config)


def field_name(name: str) -> str:
    """The field of a setting."""
    return f"{name}_" if keyword.iskeyword(name) else name


def kind_of(key: str) -> Any:
    """The type of a setting, without None."""
    schema: Any = RunConfig
    for name in key.replace("[0]", "").split("."):
        schema = get_type_hints(schema)[field_name(name)]
        schema = get_args(schema)[0] if schema == list[ExtraTeacherConfig] else schema
    kinds = get_args(schema) if get_origin(schema) in (Union, UnionType) else [schema]
    return next(kind for kind in kinds if kind is not NoneType)


def numbers(pick: Callable[[Rules, type], list[float]]) -> list[tuple[str, Any]]:
    """Settings with a range, each with the numbers that ``pick`` takes for it."""
    cases: list[tuple[str, Any]] = []
    for key, found in ALL.items():
        kind = kind_of(key)
        in_list = get_origin(kind) is list
        number = get_args(kind)[0] if in_list else kind
        if found.rules.has_range:
            for value in pick(found.rules, number):
                cases.append((key, [number(value)] if in_list else number(value)))
    return cases


def outside(rules: Rules, number: type) -> list[float]:
    values = [end for end in (rules.gt, rules.lt) if end is not None]
    if rules.ge is not None:
        values.append(below(rules.ge, number))
    if rules.le is not None:
        values.append(-below(-rules.le, number))
    return [*values, math.nan, math.inf, -math.inf] if number is float else values


def inside(rules: Rules, number: type) -> list[float]:
    values = [end for end in (rules.ge, rules.le) if end is not None]
    if rules.gt is not None:
        values.append(-below(-rules.gt, number))
    if rules.lt is not None:
        values.append(below(rules.lt, number))
    return values


def below(bound: float, number: type) -> float:
    """The next number below."""
    return math.nextafter(bound, -math.inf) if number is float else bound - 1


def given(condition: When) -> dict[str, Any]:
    values = condition.values or (GIVEN[condition.setting],)
    return {condition.setting: values[0], **RELATED.get(condition.setting, {})}


def met(*of: Rules) -> dict[str, Any]:
    """The settings with which others have an effect."""
    return {
        key: value
        for rules in of
        if rules.only_with
        for key, value in given(rules.only_with[0]).items()
    }


def another(found: Found) -> Any:
    """A value of a setting that is in its range and not its default."""
    kind = kind_of(found.key)
    if found.key in GIVEN:
        return GIVEN[found.key]
    if get_origin(kind) is Literal:
        return next(value for value in get_args(kind) if value != found.default)
    values: dict[Any, tuple[Any, ...]] = {
        bool: (True, False), int: (2, 1), float: (0.5, 0.25), str: ("x",),
        list[int]: ([0], [1]), list[str]: (["x"],),
    }  # fmt: skip
    return next(v for v in values[kind] if v != found.default and found.rules.admits(v))


@pytest.mark.parametrize(("key", "value"), numbers(outside))
def test_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(f'{key} = {value}')} .*has to be "):
        check({key: value})


# A prompt and a response have more tokens than the least max_model_len.
@pytest.mark.parametrize(
    ("key", "value"), [case for case in numbers(inside) if case[0] != "rollout.vllm.max_model_len"]
)
def test_at_the_edge_of_the_range(key: str, value: Any) -> None:
    found = ALL[key]
    check({**met(*found.of_groups, found.rules), **RELATED.get(key, {}), key: value})


def without_effect() -> list[tuple[str, dict[str, Any], str]]:
    """A setting, others with which it has no effect, and the setting that is to blame."""
    cases: list[tuple[str, dict[str, Any], str]] = []
    for key, found in ALL.items():
        all_rules = (*found.of_groups, found.rules)
        for number, rules in enumerate(all_rules):
            if rules.only_with and rules.only_with[0].setting != key:
                cases.append((key, met(*all_rules[:number]), rules.only_with[0].setting))
            for condition in rules.no_effect_with:
                others = {**met(*all_rules), **given(condition)}
                cases.append((key, others, condition.setting))
    return cases


@pytest.mark.parametrize(("key", "others", "blamed"), without_effect())
def test_without_effect(key: str, others: dict[str, Any], blamed: str) -> None:
    value = another(ALL[key])
    message = f"^{re.escape(f'{key} = {shown(value)}')} has no effect with.*{re.escape(blamed)}"
    with pytest.raises(UserError, match=message):
        check({**others, key: value})


@pytest.mark.parametrize(
    "key", [key for key, found in ALL.items() if met(*found.of_groups, found.rules)]
)
def test_with_effect(key: str) -> None:
    found = ALL[key]
    value = another(found)
    check({**met(*found.of_groups, found.rules), **RELATED.get(key, {}), key: value})


def test_the_way_out_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path, SERVER).endswith("rollout.engine = hf; use vllm there")
    assert "leave it out" in refused(tmp_path, VLLM, START, "rollout.vllm.sleep_level=1")
    assert "vllm serve" in refused(tmp_path, VLLM, SERVER, "rollout.vllm.sleep_level=1")
    assert "use last_k or first_k" in refused(tmp_path, "taps.k=3")
    assert "forward_kl (0)" in refused(tmp_path, "output_loss.kind=jsd", "output_loss.beta=0")
    assert "above 0, and finite" in refused(tmp_path, "optimizer.adam_eps=0")
    assert "from 0 to 2147483647" in refused(tmp_path, "seed=2147483648")


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["data.prompts=[]"], ["data.prompts is empty"]),
        (["trackers=[wandb,wandb]"], ["trackers = ['wandb', 'wandb']", "each once"]),
        (["profile.start=3"], ["profile.start = 3", "profile.end, which is null"]),
        (["profile.start=3", "profile.end=3"], ["profile.end, which is 3", "above 3"]),
        (["profile.start=3", "profile.end=9", "train_iters=8"], ["at most train_iters = 8"]),
        (["profile.start=3", "profile.end=4", "profile.ranks=[]"], ["profile.ranks is empty"]),
        (["export.push_to_hub=true"], ["export.hub_model_id, which is null", "user/name"]),
        (
            ["export.push_to_hub=true", "export.hub_model_id=a/b/c"],
            ["export.hub_model_id, which is a/b/c"],
        ),
        (["taps.layers=[]"], ["taps.layers = []", "at least one"]),
        (["taps.layers=[3,1]"], ["taps.layers = [3, 1]", "rising", "[1, 3]"]),
        (["taps.layers=[1,1,3]"], ["taps.layers = [1, 1, 3]", "each once", "[1, 3]"]),
        (["extra_teachers=[{model: a, layers: [2, 0]}]"], ["extra_teachers[0].layers = [2, 0]"]),
        (["parallel.num_layers_per_stage=[0]"], ["num_layers_per_stage", "at least 1"]),
        (
            ["teacher_prompt.tokenizer=own", "output_loss.kind=jsd"],
            ["output_loss.kind = jsd", "teacher_prompt.tokenizer = own"],
        ),
        (
            ["loss.coefficient_points=[[5,1],[2,1]]"],
            ["loss.coefficient_points = [[5.0, 1.0], [2.0, 1.0]]", "rising step", "[[0, 1], [10"],
        ),
        (["loss.coefficient_points=[[0,1,2]]"], ["pairs [step, factor]"]),
        (["loss.coefficient_points=[[0.5,1]]"], ["coefficient_points = [[0.5, 1.0]]"]),
        (["output_loss.kind=jsd", "output_loss.coefficient_points=[[0,-1]]"], ["at least 0"]),
        (["loss.coefficient_points=[[0,.nan]]"], ["[[0.0, nan]]", "finite"]),
        (["taps.layers=last_n"], ["taps.layers = last_n", "taps.n"]),
        (
            ["extra_teachers=[{model: a, n: 2}]"],
            ["extra_teachers[0].layers = all", "extra_teachers[0].n = 2", "last_n needs n"],
        ),
        (["rollout.stop=[x,'']"], ["rollout.stop = ['x', '']"]),
        (["rollout.function=a.b"], ["rollout.function = a.b", "package.module:name"]),
        (
            ["taps.positions=last_k"],
            ["taps.positions = last_k", "taps.k"],
        ),
        (["taps.positions=first_k"], ["taps.positions = first_k", "taps.k"]),
        (
            ["output_loss.kind=jsd", "output_loss.positions=last_k"],
            ["output_loss.positions = last_k", "output_loss.positions_k"],
        ),
        (
            ["teacher.precision=fp8", "teacher.fp8_recipe=delayed"],
            ["teacher.fp8_recipe = delayed", "per_channel_log"],
        ),
        (["teacher.precision=fp8", "teacher.fp8_recipe=int8"], ["int8", "teacher.fp8_recipe"]),
        (
            ["teacher.refresh_interval=1", "teacher.offload=cpu"],
            ["teacher.refresh_interval = 1", "teacher.offload = none (found cpu)"],
        ),
        (
            ["teacher.refresh_interval=1", "teacher.precision=fp8"],
            ["teacher.refresh_interval = 1", "teacher.precision = bf16 (found fp8)"],
        ),
        (
            [OWN_PROMPT, "teacher_prompt.template='{prompt} {solution}'"],
            ["teacher_prompt.template = '{prompt} {solution}'", "('solution')"],
        ),
        (
            [OWN_PROMPT, "teacher_prompt.template='{prompt}'"],
            ["teacher_prompt.template = '{prompt}'", "{privileged}"],
        ),
        ([OWN_PROMPT, "data.long_prompts=cut"], ["data.long_prompts = cut", "teacher_prompt"]),
        ([OWN_PROMPT, "extra_teachers=[{model: m}]"], ["extra_teachers", "teacher_prompt"]),
        (["taps.layers=none"], ["taps.layers = none", "output_loss.kind = none"]),
        (["bridge.path=b"], ["loss.normalize = none", "bridge.path = b"]),
        (
            ["bridge.path=b", "bridge.trainable=mlp", "loss.normalize=l2"],
            ["bridge.trainable = mlp", "bridge.path = b", "leave one of the two out"],
        ),
        (
            ["bridge.trainable=linear", "ride.base=b", "ride.lambda=2"],
            ["ride.base = b", "bridge.trainable = linear"],
        ),
        (
            ["bridge.trainable=linear", "extra_teachers=[{model: m, coefficient: -0.5}]"],
            ["extra_teachers[0].coefficient = -0.5", "bridge.trainable = linear"],
        ),
        (["bridge.trainable=linear", "bridge.rank=4"], ["bridge.rank = 4", "bridge.path"]),
        (["optimizer.min_lr=1"], ["optimizer.min_lr = 1.0", "optimizer.lr = 1e-05"]),
        ([SP], ["parallel.sequence_parallel = true", "parallel.tensor_model_parallel_size"]),
        ([VPP2], ["virtual_pipeline_model_parallel_size = 2", "found 1"]),
        ([PP2, "parallel.num_layers_per_stage=[4]"], ["num_layers_per_stage", "1 entries; 2"]),
        (
            [PP2, VPP2, "parallel.num_layers_per_stage=[2,2]"],
            ["num_layers_per_stage", "2 entries; 4"],
        ),
        (
            ["batch.sequence_packing=true", "parallel.context_parallel_size=2"],
            ["batch.sequence_packing = true", "parallel.context_parallel_size = 2"],
        ),
        (
            ["batch.max_tokens=4096", "teacher.max_tokens=4095"],
            ["teacher.max_tokens = 4095", "batch.max_tokens = 4096", "at least that"],
        ),
        ([FULL, METHOD], ["recompute_granularity = full", "recompute.recompute_num_layers"]),
        ([FULL, LAYERS], ["recompute_granularity = full", "recompute.recompute_method"]),
        ([DISTRIBUTE, TP2], ["distribute_saved_activations = true", "full (found null)"]),
        (
            [DISTRIBUTE, FULL, METHOD, LAYERS],
            ["distribute_saved_activations = true", "tensor_model_parallel_size > 1 (found 1)"],
        ),
        (
            [DISTRIBUTE, FULL, METHOD, LAYERS, TP2, SP],
            ["distribute_saved_activations = true", "sequence_parallel = false", "(found true)"],
        ),
        (
            ["optimizer.overlap_param_gather=true"],
            ["optimizer.overlap_param_gather = true", "optimizer.overlap_grad_reduce"],
        ),
        (
            ["optimizer.offload_states=true", "model.params_dtype=fp32"],
            ["optimizer.offload_states = true", "model.params_dtype = bf16", "fp32"],
        ),
        (["evaluation.interval=5"], ["evaluation.interval = 5", "evaluation.data = []"]),
        (["evaluation.data=[a.parquet]"], ["evaluation.interval = null", "evaluation.data"]),
        (
            [VLLM, FP8, "model.params_dtype=fp32"],
            ["quantization = fp8_per_channel", "model.params_dtype = fp32"],
        ),
        (
            [VLLM, "rollout.vllm.sync_timeout_minutes=30"],
            ["sync_timeout_minutes = 30.0", "parallel.distributed_timeout_minutes = 30"],
        ),
        (
            [VLLM, SERVER.replace("http:", "https:")],
            ["rollout.vllm.servers = https://10.0.0.1:8000"],
        ),
        ([VLLM, SERVER.replace("]", "/v1]")], ["rollout.vllm.servers = http://10.0.0.1:8000/v1"]),
        ([VLLM, START, SERVER], ["start_servers = 1", "servers = ['http://10.0.0.1:8000']"]),
        *(
            ([VLLM, START, SPLIT, f"rollout.vllm.server_gpus={gpus}"], [f"server_gpus = {gpus}"])
            for gpus in ("[0]", "[1, 1]", "[-1, 0]", "[0, 1, 1]")
        ),
        *(
            ([VLLM, START, f"rollout.vllm.server_nodes={nodes}"], [f"server_nodes = {nodes}"])
            for nodes in ("[]", "[1, 1]", "[-1]")
        ),
        ([VLLM, START, NODES], ["start_servers = 1", "server_nodes = [0, 2]", "a multiple of 2"]),
        (
            [VLLM, "rollout.vllm.start_servers=4", NODES, "rollout.vllm.server_gpus=[0,1,2,3]"],
            ["server_gpus = [0, 1, 2, 3]", "start_servers = 4", "2 different GPUs on each node"],
        ),
        ([VLLM, "rollout.temperature=2.5"], ["rollout.temperature = 2.5", "at most 2.0"]),
        ([VLLM, "evaluation.temperature=2.5"], ["evaluation.temperature = 2.5", "at most 2.0"]),
        (
            [VLLM, "rollout.vllm.max_model_len=2047"],
            ["rollout.vllm.max_model_len = 2047", "at least 2048"],
        ),
    ],
)
def test_contradictions(tmp_path: Path, overrides: list[str], names: list[str]) -> None:
    message = refused(tmp_path, *overrides)
    assert [name for name in names if name not in message] == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["taps.positions=last_k", "taps.k=1"],
        [PP2, VPP2, "parallel.num_layers_per_stage=[1,1,1,1]"],
        [TP2, SP],
        ["batch.max_tokens=4096", "teacher.max_tokens=4096"],
        [VLLM, START, SPLIT, "rollout.vllm.server_gpus=[3,1]"],
        [VLLM, "rollout.vllm.start_servers=4", NODES, "rollout.vllm.server_gpus=[3,1]"],
        ["recompute.recompute_granularity=selective"],
        [FULL, METHOD, LAYERS, TP2, DISTRIBUTE],
        ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"],
        ["optimizer.offload_states=true", "teacher.offload=cpu", "teacher.target_memory_gb=0.5"],
        [VLLM, "rollout.vllm.max_model_len=2048", "rollout.vllm.sleep_level=1"],
        [VLLM, SPLIT, PP2, FP8],
        [VLLM, SPLIT],
        [VLLM, SERVER, "rollout.vllm.max_model_len=2048", "rollout.vllm.max_restarts=0"],
        ["teacher_prompt.suffix=s", "teacher_prompt.max_tokens=9"],
        # The largest values that vLLM takes.
        [VLLM, "rollout.temperature=2", "evaluation.temperature=2"],
        # Without vLLM its limits do not hold.
        ["rollout.temperature=2.5", "parallel.distributed_timeout_minutes=1"],
    ],
)
def test_allowed(tmp_path: Path, overrides: list[str]) -> None:
    load(tmp_path, *overrides)


def test_every_condition_is_on_a_setting() -> None:
    all_rules = [rules for found in ALL.values() for rules in (*found.of_groups, found.rules)]
    conditions = [c for rules in all_rules for c in (*rules.only_with, *rules.no_effect_with)]
    assert len(conditions) > 20
    assert {condition.setting for condition in conditions} <= set(ALL)
