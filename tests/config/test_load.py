import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_oprd.config.aliases import ALIASES
from megatron_oprd.config.load import all_keys, dump_config, load_config
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
        ("loss.coefficient_points=[1,2]", r"setting loss\.coefficient_points"),
        ("ride.lambda=x", r"'x'.*setting ride\.lambda\)"),
        (
            "taps.layers=some",
            r"'some'.*\[all, last, last_n, even, odd, none\].*setting taps\.layers",
        ),
        ("taps.layers=[0,a]", r"setting taps\.layers"),
        ("taps.layer_map=linear", r"'linear'.*proportional.*setting taps\.layer_map"),
        ("model.params_dtype=fp16", r"'fp16'.*'fp32', 'bf16'.*setting model\.params_dtype"),
        ("data.prompts=p.jsonl", r"data\.prompts = p\.jsonl has to be a list"),
        ("parallel.num_layers_per_stage=4", r"parallel\.num_layers_per_stage = 4 has to be a list"),
        ("model=s", "setting 'model' is 's'"),
        ("optimizer=null", "setting 'optimizer' is None"),
        ("model.student.path=s", r"setting model\.student"),
        ("data.prompts.first=p", r"override 'data\.prompts\.first=p': "),
        ("optimizer.lr=[", r"override 'optimizer\.lr=\[': .*did not find expected"),
        ("optimizer.lr", r"override 'optimizer\.lr'.* key=value"),
    ],
)
def test_values_of_the_wrong_type(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: b: c", r"cannot be read .*mapping values are not allowed .* line 1, column 5"),
        (b"seed: 1\nseed: 2", "found duplicate key seed"),
        (b"\xff\xfe\x00", "cannot be read .*'utf-8' codec"),
        (b"- 1", "key: value"),
        (b"5", "cannot be read"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(UserError, match=rf"--config .*run\.yaml.* {message}") as error:
        load_config(tmp_path / "run.yaml")
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--config .*none\.yaml cannot be read"):
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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=fast", r"^override 'optimizer\.lr=fast'.*optimizer\.lr"),
        (
            "data.prompts=a.jsonl",
            r"^override .*data\.prompts = a\.jsonl has .*a list; .*\[a\.js",
        ),
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
    known = set(all_keys(RunConfig))
    assert set(ALIASES.values()) <= known
    assert not set(ALIASES) & {key.rsplit(".", 1)[-1] for key in known}
