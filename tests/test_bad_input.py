"""What a user can get wrong, through the command line: exit code 2 and one clear line."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_oprd import train
from megatron_oprd.errors import run_entry_point
from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.helpers.pairs import config_of, save_pair
from tests.helpers.tiny import copy_with_config, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("bad_input") / "pair", "llama")


@pytest.fixture
def pair(original: Path, tmp_path: Path) -> Path:
    """A copy of the pair that a test may spoil."""
    copy = tmp_path / "pair"
    shutil.copytree(original, copy)
    run_file = copy / "run.yaml"
    run_file.write_text(run_file.read_text().replace(str(original), str(copy)))
    return copy


def change_teacher(pair: Path, **fields: Any) -> None:
    (pair / "teacher").rename(pair / "old")
    copy_with_config(pair / "old", pair / "teacher", **fields)


def empty_prompts(pair: Path) -> None:
    (pair / "prompts.jsonl").write_text("\n")


def broken_prompts(pair: Path) -> None:
    (pair / "prompts.jsonl").write_text('{"prompt": \n')


def other_tokenizer(pair: Path) -> None:
    tiny_tokenizer(80).save_pretrained(pair / "teacher")


def no_teacher(pair: Path) -> None:
    shutil.rmtree(pair / "teacher")


def other_architecture(pair: Path) -> None:
    change_teacher(pair, architectures=["GPT2LMHeadModel"])


def unsupported_field(pair: Path) -> None:
    change_teacher(pair, attn_logit_softcapping=50.0)


def unsupported_rope(pair: Path) -> None:
    change_teacher(
        pair, rope_parameters={"rope_type": "proportional", "factor": 2.0, "rope_theta": 10000.0}
    )


def dynamic_rope(pair: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    change_teacher(pair, rope_parameters=rope, max_position_embeddings=64)


def truncated_weights(pair: Path) -> None:
    file = pair / "student" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def checkpoint_of(pair: Path, *, hidden_size: int) -> None:
    checkpoint = pair / "run" / "checkpoints" / "step_0000002"
    checkpoint.mkdir(parents=True)
    student = {"family": "LlamaForCausalLM", "num_layers": 4, "hidden_size": hidden_size}
    others: dict[str, Any] = {"skipped_steps": 0, "teacher": {}, "layout": {}, "settings": {}}
    others |= {"version": 2, "run": {}, "files": {}, "unsupervised_steps": 0}
    manifest = {"step": 2, "student": student, **others}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def checkpoint_of_another_model(pair: Path) -> None:
    checkpoint_of(pair, hidden_size=48)


def nothing(pair: Path) -> None:
    pass


# name: (what is spoilt, arguments, number of processes, what the message has to say)
BAD_INPUT: dict[str, tuple[Callable[[Path], None], list[str], int, list[str]]] = {
    "unknown key": (nothing, ["optimizer.clip_gard=1"], 1, ["nearest is 'optimizer.clip_grad'"]),
    "wrong type": (nothing, ["train_iters=many"], 1, ["train_iters", "many"]),
    "missing model": (no_teacher, [], 1, ["pair/teacher", "does not exist"]),
    "truncated weights": (truncated_weights, [], 1, ["model.safetensors", "not a whole"]),
    "empty prompts": (empty_prompts, [], 1, ["data.prompts", "prompts.jsonl", "no rows"]),
    "broken prompts": (broken_prompts, [], 1, ["prompts.jsonl, line 1", "not JSON"]),
    "missing prompts": (nothing, ["data.prompts=[none.jsonl]"], 1, ["none.jsonl"]),
    "tokenizers": (other_tokenizer, [], 1, ["tokenizers", "differ", "token id 80"]),
    "tensor parallel": (
        nothing,
        ["parallel.tensor_model_parallel_size=3"],
        3,
        ["parallel.tensor_model_parallel_size = 3", "4 attention heads"],
    ),
    "world size": (
        nothing,
        ["parallel.pipeline_model_parallel_size=2"],
        3,
        ["3 processes", "parallel.pipeline_model_parallel_size = 2"],
    ),
    "architecture": (other_architecture, [], 1, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
    "field": (unsupported_field, [], 1, ["pair/teacher/config.json", "attn_logit_softcapping"]),
    "no loss": (nothing, ["taps.layers=none"], 1, ["taps.layers = none", "output_loss.kind"]),
    "layer weights": (
        nothing,
        ["loss.layer_weights=[1,2]"],
        1,
        ["loss.layer_weights has 2 entries", "selects 4 layers"],
    ),
    "top-k of a small vocabulary": (
        nothing,
        ["output_loss.kind=top_k", "output_loss.k=98"],
        1,
        ["output_loss.k = 98", "the 97 tokens"],
    ),
    "norm of the teacher on two stages": (
        nothing,
        [
            "output_loss.kind=reverse_kl",
            "parallel.pipeline_model_parallel_size=2",
            "taps.layers=[0,1]",
            "taps.layer_map=[1,3]",
        ],
        2,
        ["taps.layer_map", "all 4 teacher layers", "pre_norm"],
    ),
    "experts of a dense teacher": (
        nothing,
        ["teacher.expert_model_parallel_size=2"],
        2,
        ["teacher.expert_model_parallel_size = 2", "no mixture of experts"],
    ),
    "privileged column": (
        nothing,
        ["teacher_prompt.privileged_key=solution"],
        1,
        ["teacher_prompt.privileged_key is 'solution'", "has only 'prompt'"],
    ),
    "rollout function": (
        nothing,
        ["rollout.function=nowhere:to_be_found"],
        1,
        ["rollout.function = nowhere:to_be_found cannot be imported", "PYTHONPATH"],
    ),
    "refresh of another model": (
        nothing,
        ["teacher.refresh_interval=1", "taps.layers=[0]", "taps.layer_map=[1]"],
        1,
        ["teacher.refresh_interval = 1", "layer 0 with teacher layer 1"],
    ),
    "distributions over other tokens": (
        nothing,
        ["teacher_prompt.tokenizer=own", "output_loss.kind=jsd"],
        1,
        ["output_loss.kind = jsd", "different tokens"],
    ),
    "delayed FP8": (
        nothing,
        ["teacher.precision=fp8", "teacher.fp8_recipe=delayed"],
        1,
        ["teacher.fp8_recipe = delayed", "gradients"],
    ),
    "no FP8 layer": (
        nothing,
        ["teacher.precision=fp8", "teacher.num_layers_at_start_in_bf16=4"],
        1,
        ["teacher.num_layers_at_start_in_bf16 = 4", "4 layers"],
    ),
    "bridge rank alone": (nothing, ["bridge.rank=8"], 1, ["bridge.rank = 8", "bridge.path"]),
    "bridge of rank 1": (
        nothing,
        ["bridge.path=b", "bridge.rank=1", "loss.normalize=l2"],
        1,
        ["at least 2"],
    ),
    "bridge without l2": (
        nothing,
        ["bridge.path=b"],
        1,
        ["loss.normalize = none", "loss.normalize = l2"],
    ),
    "no bridge": (
        nothing,
        ["bridge.path=b", "loss.normalize=l2"],
        1,
        ["bridge.path = b", "no manifest.json", "megatron_oprd.build_bridge"],
    ),
    "rope": (unsupported_rope, [], 1, ["pair/teacher/config.json", "'proportional'"]),
    "longer than rope": (
        dynamic_rope,
        [],
        1,
        ["data.max_prompt_tokens = 64", "model.teacher", "at most 64", "rope_type 'dynamic'"],
    ),
    "checkpoint": (
        checkpoint_of_another_model,
        [],
        1,
        ["step_0000002 is of another model", "hidden_size = 48", "output_dir"],
    ),
    "not to resume": (
        lambda pair: checkpoint_of(pair, hidden_size=32),
        ["checkpoint.resume=never"],
        1,
        ["step_0000002", "checkpoint.resume = never"],
    ),
}


def files_of(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def check_message(stderr: str, parts: list[str]) -> None:
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(
    pair: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("the mistake was not found in time")

    spoil, arguments, world_size, parts = BAD_INPUT[name]
    spoil(pair)
    before = files_of(pair)
    monkeypatch.setattr(HFCheckpoint, "read_slice", refuse)
    monkeypatch.setattr(train, "parallel_run", refuse)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setattr(sys, "argv", ["train", "--config", f"{pair}/run.yaml", *arguments])
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as exit_:
            run_entry_point(train.main)
        assert exit_.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        check_message(output.err, parts)
    # torchrun ends the others when rank 0, which does not wait, has spoken.
    assert waited == [20]
    assert files_of(pair) == before


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the entry point; what torch logs of itself is taken out of its stderr."""
    result = subprocess.run(
        [sys.executable, "-m", "megatron_oprd.train", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # A CUDA build of torch says on a machine without CUDA that it found none.
    lines = result.stderr.splitlines(keepends=True)
    result.stderr = "".join(x for x in lines if not re.match(r"[IWE]\d{4} .*/torch/", x))
    return result


def test_bad_input_as_a_process(pair: Path) -> None:
    spoil, arguments, world_size, parts = BAD_INPUT["world size"]
    spoil(pair)
    result = start("--config", f"{pair}/run.yaml", *arguments, WORLD_SIZE=str(world_size), RANK="0")
    assert result.returncode == 2
    check_message(result.stderr, parts)
    assert result.stdout == ""
    assert not (pair / "run").exists()


def test_dry_run(pair: Path) -> None:
    """It needs no torchrun, whatever the layout."""
    overrides = [
        "parallel.pipeline_model_parallel_size=2",
        "parallel.tensor_model_parallel_size=2",
        "parallel.context_parallel_size=2",
        "seed=77",
    ]
    result = start("--config", f"{pair}/run.yaml", "--dry-run", *overrides)
    assert (result.returncode, result.stderr) == (0, "")
    assert "seed: 77" in result.stdout
    assert f"student: {config_of(pair, []).model.student}" in result.stdout
    assert "0 -> 0, 1 -> 1, 2 -> 2, 3 -> 3" in result.stdout
    assert "rank 0: student layers 0-1; teacher layers 0-1" in result.stdout
    assert "rank 1: student layers 2-3; teacher layers 2-3" in result.stdout
    assert not (pair / "run").exists()
