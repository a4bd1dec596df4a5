import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_oprd.config import load as config_load
from megatron_oprd.config.load import dump_config, load_config
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.errors import UserError

SETTINGS: dict[str, Any] = {
    "output_dir": "run",
    "model": {"student": "s", "teacher": "t"},
    "data": {"prompts": ["p.jsonl"]},
}


def load(folder: Path, *overrides: str, text: str | None = None) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(SETTINGS) if text is None else text)
    return load_config(path, overrides)


def test_defaults_and_overrides(tmp_path: Path) -> None:
    text = yaml.safe_dump({**SETTINGS, "optimizer": {"lr": 3.0, "clip_grad": 2.0}, "seed": 5})
    config = load(tmp_path, "optimizer.lr=1e-5", "seed=6", "seed=7", text=text)
    assert (config.model.student, config.model.teacher, config.output_dir) == ("s", "t", "run")
    assert config.data.prompts == ["p.jsonl"]
    assert (config.optimizer.lr, config.optimizer.clip_grad, config.seed) == (1e-5, 2.0, 7)
    assert config.rollout == RunConfig().rollout
    assert config.taps == RunConfig().taps


@pytest.mark.parametrize(
    ("override", "section", "expected"),
    [
        ("taps.layers=[0,2]", "taps", [0, 2]),
        ("taps.layers=odd", "taps", "odd"),
        ("taps.layer_map=[3,1]", "taps", [3, 1]),
        ("data.chat_template=false", "data", False),
        ("data.chat_template=null", "data", None),
        ("data.prompts=[a.jsonl,b.parquet]", "data", ["a.jsonl", "b.parquet"]),
        ("batch.micro_batch_size=2", "batch", 2),
        ("loss.coefficient=100", "loss", 100.0),
    ],
)
def test_values_of_every_kind(tmp_path: Path, override: str, section: str, expected: Any) -> None:
    config = load(tmp_path, override)
    name = override.partition("=")[0].partition(".")[2]
    assert getattr(getattr(config, section), name) == expected


def test_dumped_configuration_loads_as_the_same(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "taps.layers=[0,2]",
        "taps.layer_map=[1,5]",
        "taps.positions=last_k",
        "taps.k=7",
        "optimizer.lr=3.5e-6",
        "data.chat_template=true",
        "parallel.pipeline_model_parallel_size=2",
        "parallel.num_layers_per_stage=[1,3]",
        "checkpoint.resume=never",
    )
    again = load(tmp_path, text=dump_config(config))
    assert again == config
    assert again != load(tmp_path)
    # Every field is there, also those that were not given.
    assert yaml.safe_load(dump_config(config)) == dataclasses.asdict(config)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optimizer.lrr", "optimizer.lr"),
        ("optimizer.wieght_decay", "optimizer.weight_decay"),
        ("train_iter", "train_iters"),
        ("paralel.x", "parallel"),
        ("parallel.tensor_model_parallel", "parallel.tensor_model_parallel_size"),
        # Known, but in another group.
        ("lr", "optimizer.lr"),
        ("data.max_new_tokens", "rollout.max_new_tokens"),
        ("taps.coefficient", "loss.coefficient"),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path: Path, key: str, nearest: str) -> None:
    full = "paralel" if key == "paralel.x" else key
    with pytest.raises(UserError) as error:
        load(tmp_path, f"{key}=1")
    assert str(error.value) == f"unknown setting {full!r}; the nearest is {nearest!r}"
    # The same in the file.
    settings: dict[str, Any] = {**SETTINGS}
    group, _, name = key.rpartition(".")
    if group:
        settings[group] = {**settings.get(group, {}), name: 1}
    else:
        settings[name] = 1
    with pytest.raises(UserError, match=f"nearest is '{nearest}'"):
        load(tmp_path, text=yaml.safe_dump(settings))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=fast", r"'fast'.*setting optimizer\.lr"),
        ("train_iters=1.5", r"'1\.5'.*setting train_iters"),
        ("train_iters=null", "setting train_iters"),
        ("seed=true", "'True'.*setting seed"),
        ("tensorboard=maybe", "'maybe'.*setting tensorboard"),
        ("taps.layers=some", r"'some'.*\[all, last, even, odd, none\].*setting taps\.layers"),
        ("taps.layers=[0,a]", r"setting taps\.layers"),
        ("taps.layer_map=linear", r"'linear'.*proportional.*setting taps\.layer_map"),
        ("model.params_dtype=fp16", r"'fp16'.*'fp32', 'bf16'.*setting model\.params_dtype"),
        ("data.prompts=p.jsonl", r"data\.prompts = p\.jsonl has to be a list"),
        ("parallel.num_layers_per_stage=4", r"parallel\.num_layers_per_stage = 4 has to be a list"),
        ("model=s", "setting 'model': expected a group of settings, found 's'"),
        ("optimizer=null", "setting 'optimizer': expected a group of settings, found None"),
        ("model.student.path=s", r"setting model\.student"),
        ("data.prompts.first=p", r"override 'data\.prompts\.first=p': "),
        ("optimizer.lr=[", r"override 'optimizer\.lr=\[': .*did not find expected"),
        ("optimizer.lr", r"override 'optimizer\.lr': expected key=value"),
    ],
)
def test_values_of_the_wrong_type(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: b: c", r"cannot be read: mapping values are not allowed .* line 1, column 5"),
        (b"seed: 1\nseed: 2", "found duplicate key seed"),
        (b"\xff\xfe\x00", "cannot be read: 'utf-8' codec"),
        (b"- 1", r"expected settings \(key: value\)"),
        (b"5", "cannot be read"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(UserError, match=rf"--config .*run\.yaml: .*{message}") as error:
        load_config(tmp_path / "run.yaml")
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--config .*none\.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("key", ["output_dir", "model.student", "model.teacher"])
def test_missing_settings(tmp_path: Path, key: str) -> None:
    everything = ["output_dir=run", "model.student=s", "model.teacher=t", "data.prompts=[p]"]
    assert load(tmp_path, *everything, text="").model.teacher == "t"
    others = [setting for setting in everything if not setting.startswith(key)]
    with pytest.raises(UserError, match=rf"^{key} is not set; give it .* as {key}=\.\.\.$"):
        load(tmp_path, *others, text="")
    with pytest.raises(UserError, match=f"^{key} is empty"):
        load(tmp_path, *others, f"{key}=''", text="")


AT_LEAST_ONE = [
    "train_iters",
    "model.make_vocab_size_divisible_by",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.distributed_timeout_minutes",
    "taps.k",
    "data.max_prompt_tokens",
    "rollout.prompts_per_step",
    "rollout.samples_per_prompt",
    "rollout.max_new_tokens",
    "rollout.max_batch_size",
    "rollout.logprob_check_interval",
    "batch.max_tokens",
    "batch.micro_batch_size",
    "optimizer.max_skipped_in_a_row",
    "recompute.recompute_num_layers",
    "checkpoint.save_interval",
    "checkpoint.keep",
]
NOT_NEGATIVE = ["optimizer.lr", "optimizer.min_lr", "optimizer.weight_decay",
                "optimizer.clip_grad", "loss.coefficient", "rollout.temperature"]  # fmt: skip
BELOW_ONE = ["optimizer.lr_warmup_fraction", "optimizer.adam_beta1", "optimizer.adam_beta2"]
OUT_OF_RANGE = [
    *((f"{key}={value}", "at least 1") for key in AT_LEAST_ONE for value in (0, -3)),
    *((f"{key}={v}", "0 or more") for key in NOT_NEGATIVE for v in (-0.5, ".nan", ".inf")),
    ("rollout.top_k=-1", "0 or more"),
    ("seed=-1", "0 or more"),
    *((f"{key}={v}", r"in \[0, 1\)") for key in BELOW_ONE for v in (-0.1, 1.0, ".nan")),
    *((f"rollout.top_p={value}", r"in \(0, 1\]") for value in (0.0, 1.5, ".nan")),
    *((f"optimizer.adam_eps={value}", "above 0") for value in (0.0, -1e-8, ".inf")),
]


@pytest.mark.parametrize(("override", "message"), OUT_OF_RANGE)
def test_numbers_out_of_range(tmp_path: Path, override: str, message: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(UserError, match=rf"^{key} = {value.strip('.')}.*: has to be {message}"):
        load(tmp_path, override)


TP2, SP = "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"
DISTRIBUTE = "recompute.distribute_saved_activations=true"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
FULL = "recompute.recompute_granularity=full"
VLLM = "rollout.engine=vllm"
FP8 = "rollout.vllm.quantization=fp8_per_channel"
SPLIT = "rollout.vllm.tensor_model_parallel_size=2"
SERVER = "rollout.vllm.server_url=http://10.0.0.1:8000"
START = "rollout.vllm.start_server=true"
OF_EMBEDDED = ("sleep_level=1", "sync_bucket_mb=4")
OF_STARTED = (
    *("gpu_memory_utilization=0.5", "kv_cache_gb=1", "enforce_eager=true"),
    "tensor_model_parallel_size=2",
)
METHOD, LAYERS = "recompute.recompute_method=block", "recompute.recompute_num_layers=1"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.prompts=[]"], r"data\.prompts is empty"),
        (["taps.positions=last_k"], r"taps\.positions = last_k needs taps\.k"),
        (["taps.positions=first_k"], r"taps\.positions = first_k needs taps\.k"),
        (["taps.k=3"], r"taps\.k = 3 has no effect with taps\.positions = all"),
        (["taps.positions=last", "taps.k=1"], r"no effect with taps\.positions = last;"),
        (
            ["teacher.precision=fp8", "teacher.fp8_recipe=delayed"],
            r"fp8_recipe = delayed is wrong for a teacher.*per_channel_log",
        ),
        (["output_loss.k=4"], r"output_loss\.k has no effect with output_loss\.kind = none"),
        (
            ["output_loss.kind=jsd", "output_loss.k=4"],
            r"output_loss\.k = 4 has no effect with output_loss\.kind = jsd; it is for top_k",
        ),
        (["output_loss.kind=jsd", "output_loss.beta=1"], r"output_loss\.beta = 1\.0: has to be"),
        (
            ["output_loss.kind=jsd", "output_loss.positions=last_k"],
            r"output_loss\.positions = last_k needs output_loss\.positions_k",
        ),
        (
            ["output_loss.kind=jsd", "output_loss.teacher_temperature=0"],
            r"output_loss\.teacher_temperature = 0\.0: has to be above 0",
        ),
        (
            ["teacher_prompt.max_tokens=9"],
            r"teacher_prompt\.max_tokens = 9 has no effect without teacher_prompt\.privileged_key",
        ),
        (
            ["teacher_prompt.privileged_key=a", "teacher_prompt.template='{prompt} {solution}'"],
            r"teacher_prompt\.template = '\{prompt\} \{solution\}' is no template: 'solution'",
        ),
        (
            ["teacher_prompt.privileged_key=a", "teacher_prompt.template='{prompt}'"],
            r"teacher_prompt\.template = '\{prompt\}' has no \{privileged\}",
        ),
        (["teacher.ema_decay=0.9"], r"teacher\.ema_decay = 0\.9 has no effect without"),
        (
            ["teacher.refresh_interval=1", "teacher.offload=cpu"],
            r"teacher\.refresh_interval = 1 needs .*teacher\.offload = none \(found cpu\)",
        ),
        (["loss.layer_weights=[1,-1]"], r"loss\.layer_weights = \[1\.0, -1\.0\]: have to be"),
        (["teacher.fp8_recipe=block_128"], r"= block_128 has no effect with teacher\.precision"),
        (["teacher.num_layers_at_end_in_bf16=1"], r"= 1 has no effect with teacher\.precision"),
        (["teacher.precision=fp8", "teacher.num_layers_at_end_in_bf16=-1"], r"-1: has to be 0 or"),
        (["teacher.precision=fp8", "teacher.fp8_recipe=int8"], r"int8.*teacher\.fp8_recipe"),
        (["optimizer.min_lr=1"], r"optimizer\.min_lr = 1\.0 is above optimizer\.lr = 1e-05"),
        (["parallel.sequence_parallel=true"], r"needs parallel\.tensor_model_parallel_size > 1"),
        ([VPP2], r"virtual_pipeline_model_parallel_size = 2 with .* = 1: both"),
        ([PP2, VPP2.replace("=2", "=1")], r"virtual_.* = 1 with .* = 2: both"),
        ([PP2, "parallel.num_layers_per_stage=[4]"], "has 1 entries; 2 are needed"),
        ([PP2, VPP2, "parallel.num_layers_per_stage=[2,2]"], "has 2 entries; 4 are needed"),
        ([FULL, METHOD], r"recompute_num_layers = None with .* = full"),
        ([FULL, LAYERS], r"recompute_method = None with .* = full"),
        ([METHOD], r"recompute_method = block with .* = None"),
        (
            ["recompute.recompute_granularity=selective", LAYERS],
            r"recompute_num_layers = 1 with .* = selective",
        ),
        ([DISTRIBUTE, TP2], r"distribute_saved_activations = true needs .* full \(found None"),
        ([DISTRIBUTE, FULL, METHOD, LAYERS], r"tensor_model_parallel_size > 1 \(found 1\)"),
        ([DISTRIBUTE, FULL, METHOD, LAYERS, TP2, SP], r"sequence_parallel = .* \(found true\)"),
        (["optimizer.overlap_param_gather=true"], r"overlap_param_gather = true needs"),
        (
            ["optimizer.offload_states=true", "model.params_dtype=fp32"],
            r"offload_states = true needs model\.params_dtype = bf16, found fp32",
        ),
        (["teacher.target_memory_gb=0"], r"target_memory_gb = 0\.0: has to be above 0"),
        (["evaluation.interval=5"], r"evaluation.interval = 5 with evaluation.data = \[\]"),
        (["evaluation.data=[a.parquet]"], "evaluation.interval = None with evaluation.data"),
        (["rollout.stop=[x,'']"], "rollout.stop has an empty text"),
        (
            [
                "rollout.engine=vllm",
                "rollout.one_step_off_policy=true",
                "checkpoint.save_interval=1",
            ],
            r"one_step_off_policy = true has no effect with checkpoint\.save_interval = 1",
        ),
        (
            ["rollout.one_step_off_policy=true"],
            r"one_step_off_policy = true with rollout\.engine = hf, which",
        ),
        (
            ["rollout.logprob_warning_threshold=0.2"],
            r"threshold = 0\.2 has no effect without rollout\.logprob_check_interval",
        ),
        (
            ["rollout.logprob_check_interval=1", "rollout.logprob_warning_threshold=0"],
            r"logprob_warning_threshold = 0\.0: has to be above 0",
        ),
        (["evaluation.top_p=0"], r"evaluation\.top_p = 0\.0: has to be in \(0, 1\]"),
        (["rollout.vllm.enforce_eager=true"], r"no effect with rollout\.engine = hf; use vllm"),
        (
            [VLLM, FP8, "model.params_dtype=fp32"],
            r"quantises .* in bf16; model\.params_dtype = fp32",
        ),
        (
            [VLLM, FP8, "rollout.vllm.check_weights_interval=2"],
            r"interval = 2: with rollout\.vllm\.quantization = fp8_per_channel .* leave it out",
        ),
        ([VLLM, SPLIT], r"size = 2: .* from 1 to 1 \(tensor x context x pipeline"),
        ([VLLM, "rollout.vllm.gpu_memory_utilization=1"], r"has to be above 0 and below 1"),
        ([VLLM, "rollout.vllm.sleep_level=3"], r"sleep_level = 3: has to be 0, 1 or 2"),
        ([VLLM, "rollout.vllm.kv_cache_gb=0"], r"kv_cache_gb = 0\.0: has to be above 0"),
        ([VLLM, "rollout.vllm.timeout_minutes=0"], r"timeout_minutes = 0\.0: has to be above"),
        ([VLLM, "rollout.vllm.sync_timeout_minutes=30"], r"below parallel\.distributed_timeout_m"),
        ([VLLM, "rollout.vllm.max_restarts=-1"], r"max_restarts = -1: has to be 0 \(never\)"),
        ([SERVER], r"no effect with rollout\.engine = hf; use vllm"),
        ([VLLM, SERVER.replace("http:", "https:")], r"server_url = https.*: has to be as in http:"),
        ([VLLM, f"{SERVER}/v1"], r"server_url = .*/v1: has to be as in http://127\.0\.0\.1:8000"),
        *(
            ([VLLM, SERVER, f"rollout.vllm.{one}"], r"no effect with .*url; give it to vllm serve")
            for one in (*OF_EMBEDDED, *OF_STARTED, "server_gpus=[1]")
        ),
        *(
            ([VLLM, START, f"rollout.vllm.{one}"], r"no effect with .*start_server; leave it out")
            for one in OF_EMBEDDED
        ),
        (
            [VLLM, "rollout.vllm.server_gpus=[1]"],
            r"\[1\] has no effect with an engine beside each replica; it is for .*start_server",
        ),
        ([START], r"no effect with rollout\.engine = hf; use vllm"),
        ([VLLM, START, SERVER], r"start_server = true with .*server_url = http://10.*: the run"),
        *(
            ([VLLM, START, SPLIT, f"rollout.vllm.server_gpus={one}"], r"as many different GPU")
            for one in ("[0]", "[1,1]", "[-1,0]", "[0,1,1]")
        ),
        ([VLLM, START, SPLIT.replace("=2", "=0")], r"parallel_size = 0: has to be 1 or above"),
        ([VLLM, "rollout.temperature=2.5"], r"vLLM takes at most 2\.0"),
        (
            [VLLM, "rollout.vllm.max_model_len=2047"],
            r"max_model_len = 2047 is below .* = 2048: .* give at least 2048",
        ),
    ],
)
def test_contradictions(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["taps.positions=last_k", "taps.k=1"],
        [PP2, VPP2, "parallel.num_layers_per_stage=[1,1,1,1]"],
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        [VLLM, *(f"rollout.vllm.{one}" for one in (*OF_EMBEDDED, *OF_STARTED[:3]))],
        [VLLM, SERVER],
        [VLLM, START],
        [VLLM, START, *(f"rollout.vllm.{one}" for one in (*OF_STARTED, "server_gpus=[3,1]"))],
        [FULL, METHOD, LAYERS],
        ["recompute.recompute_granularity=selective"],
        [FULL, METHOD, LAYERS, TP2, DISTRIBUTE],
        ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"],
        ["optimizer.offload_states=true", "teacher.offload=cpu", "teacher.target_memory_gb=0.5"],
        [VLLM, "rollout.vllm.max_model_len=2048", "rollout.vllm.sleep_level=1"],
        [VLLM, SPLIT, PP2, FP8],
        [VLLM, SERVER, "rollout.vllm.max_model_len=2048", "rollout.vllm.max_restarts=0"],
        ["rollout.temperature=0", "rollout.top_p=1", "optimizer.clip_grad=0", "seed=0"],
        ["optimizer.lr_warmup_fraction=0", "optimizer.adam_beta1=0", "optimizer.lr=0"],
    ],
)
def test_allowed_at_the_edge(tmp_path: Path, overrides: list[str]) -> None:
    load(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=fast", r"^override 'optimizer\.lr=fast'.*optimizer\.lr"),
        (
            "data.prompts=a.jsonl",
            r"^override .*data\.prompts = a\.jsonl has .*a list; .*\[a\.js",
        ),
        ("seed=2147483648", r"seed = 2147483648: has to be at most 2147483647"),
        ("optimizer.learning_rate=1", r"here it is called 'optimizer\.lr'"),
        ("max_steps=5", r"here it is called 'train_iters'"),
        ("num_generations=8", r"here it is called 'rollout\.samples_per_prompt'"),
        ("rollout.max_completion_length=8", r"called 'rollout\.max_new_tokens'"),
        ("checkpoint.save_steps=8", r"called 'checkpoint\.save_interval'"),
    ],
)
def test_messages_of_settings(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, override)


def test_errors_of_the_file_name_the_file(tmp_path: Path) -> None:
    text = yaml.safe_dump({**SETTINGS, "optimizer": {"lr": "fast"}})
    with pytest.raises(UserError, match=r"^--config .*run\.yaml: .*optimizer\.lr"):
        load(tmp_path, "seed=3", text=text)


def test_every_alias_is_of_a_setting() -> None:
    known = set(config_load._all_keys(RunConfig))
    assert set(config_load._ALIASES.values()) <= known
    assert not set(config_load._ALIASES) & {key.rsplit(".", 1)[-1] for key in known}
