"""A run goes on only as the run it was: what is compared, and what is read of a checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_oprd.errors import UserError
from megatron_oprd.training.identity import RunIdentity
from megatron_oprd.training.plan import RunPlan, make_plan
from megatron_oprd.training.resume import checkpoint_to_resume, with_schedule_of
from tests.data.test_benchmarks import row, write
from tests.helpers.pairs import config_of, save_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("resume_checks") / "pair", "llama")


def plan(pair: Path, out: Path, *overrides: str) -> RunPlan:
    return make_plan(config_of(pair, [f"output_dir={out}", *overrides]), world_size=2)


def checkpoint(pair: Path, out: Path, **changes: Any) -> Path:
    """A checkpoint folder with the manifest of step 4 of the pair's run."""
    written = plan(pair, out)
    manifest = {
        "version": 2,
        "run": RunIdentity.new(written).as_json(),
        "files": {},
        "step": 4,
        "skipped_steps": 0,
        "unsupervised_steps": 0,
        "student": dataclasses.asdict(written.layout.student.architecture),
        "teacher": dataclasses.asdict(written.layout.teacher.architecture),
        "layout": {},
        "settings": dataclasses.asdict(written.config),
    }
    folder = out / "checkpoints" / "step_0000004"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


def test_goes_on_with_the_same_settings(pair: Path, tmp_path: Path) -> None:
    assert checkpoint_to_resume(plan(pair, tmp_path)) is None
    folder = checkpoint(pair, tmp_path)
    assert checkpoint_to_resume(plan(pair, tmp_path)) == folder


def test_goes_on_after_an_update_with_further_fields(pair: Path, tmp_path: Path) -> None:
    """A checkpoint lacks the fields of architectures that are newer than itself."""
    folder = checkpoint(pair, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    for model in (manifest["student"], manifest["teacher"]):
        for field in ("sliding_window", "sliding_layers", "rotated_layers", "pre_norms"):
            del model[field]
        del model["embedding_multiplier"]
        del model["rope"]["beta_fast"], model["rope"]["truncate"], model["rope"]["interleaved"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint_to_resume(plan(pair, tmp_path)) == folder


def test_models_with_lists_of_layers(tmp_path: Path) -> None:
    """They go on, and a model whose layers slide differently is another one."""
    kinds = [["full_attention", "sliding_attention"] * 2, ["sliding_attention"] * 4]
    pairs = [
        save_pair(
            tmp_path / str(number),
            "qwen3",
            use_sliding_window=True,
            sliding_window=5,
            layer_types=layer_types,
        )
        for number, layer_types in enumerate(kinds)
    ]
    folder = checkpoint(pairs[0], tmp_path / "run")
    assert checkpoint_to_resume(plan(pairs[0], tmp_path / "run")) == folder
    with pytest.raises(UserError, match=r"sliding_layers = \[False, True, .* has \[True, True"):
        checkpoint_to_resume(plan(pairs[1], tmp_path / "run"))


@pytest.mark.parametrize(
    "override",
    [
        "parallel.pipeline_model_parallel_size=2",
        "batch.micro_batch_size=1",
        "checkpoint.keep=5",
        "tensorboard=true",
        "train_iters=1000",
        "teacher.offload=cpu",
        "teacher.target_memory_gb=0.5",
        "teacher.max_tokens=20000",
        "optimizer.overlap_grad_reduce=true",
        "optimizer.use_distributed_optimizer=false",
        "optimizer.lr_decay_iters=500",
        "evaluation={interval: 1, data: [DATA], max_new_tokens: 4}",
        "model.teacher=MOVED",
        "data.prompts=[PROMPTS]",
    ],
)
def test_what_may_change(pair: Path, tmp_path: Path, override: str) -> None:
    folder = checkpoint(pair, tmp_path)
    shutil.copytree(pair / "teacher", tmp_path / "moved")
    shutil.copyfile(pair / "prompts.jsonl", tmp_path / "prompts.jsonl")
    write(tmp_path / "sums.jsonl", [row("1+1", "2")])
    for word, path in (
        ("DATA", "sums.jsonl"), ("MOVED", "moved"), ("PROMPTS", "prompts.jsonl"),
    ):  # fmt: skip
        override = override.replace(word, str(tmp_path / path))
    assert checkpoint_to_resume(plan(pair, tmp_path, override)) == folder


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=0.01",
        "optimizer.lr_decay_iters=300",
        "rollout.function=tests.helpers.rollout_functions:plain",
        "taps.layers=even",
        "loss.normalize=l2",
        "model.params_dtype=bf16",
        "rollout.prompts_per_step=8",
        "seed=9",
        "data.shuffle=false",
    ],
)
def test_what_may_not_change(pair: Path, tmp_path: Path, override: str) -> None:
    checkpoint(pair, tmp_path)
    key = override.split("=")[0]
    with pytest.raises(UserError, match=f"was written with {key} = .*another output_dir"):
        checkpoint_to_resume(plan(pair, tmp_path, override))


def test_fewer_steps_than_are_done(pair: Path, tmp_path: Path) -> None:
    checkpoint(pair, tmp_path)
    with pytest.raises(UserError, match=r"train_iters = 3 .* 4 steps"):
        checkpoint_to_resume(plan(pair, tmp_path, "train_iters=3"))


def test_teacher_of_another_shape(pair: Path, tmp_path: Path) -> None:
    checkpoint(pair, tmp_path, teacher={"num_layers": 5})
    with pytest.raises(UserError, match=r"of another model: .* but model\.teacher"):
        checkpoint_to_resume(plan(pair, tmp_path))


@pytest.mark.parametrize("content", ["[]", "{}", "not JSON", '{"step": 4}'])
def test_manifest_that_is_none(
    pair: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(pair, tmp_path)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"none of the 1 checkpoints .* is whole"):
        checkpoint_to_resume(plan(pair, tmp_path))
    older = folder.with_name("step_0000002")
    shutil.copytree(checkpoint(pair, tmp_path / "other"), older)
    assert checkpoint_to_resume(plan(pair, tmp_path)) == older
    assert str(folder / "manifest.json") in capsys.readouterr().err


def test_checkpoint_of_another_version(pair: Path, tmp_path: Path) -> None:
    folder = checkpoint(pair, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["version"], manifest["files"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"version 1 .*give another output_dir"):
        checkpoint_to_resume(plan(pair, tmp_path))


def test_longer_runs_keep_their_schedule(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = RunIdentity.new(plan(pair, tmp_path))
    assert began.lr_decay_iters == 500
    longer = with_schedule_of(plan(pair, tmp_path, "train_iters=1000"), began)
    assert longer.config.decay_iters == 500
    assert longer.config.train_iters == 1000
    assert "optimizer.lr_decay_iters = 500" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', None])
@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_student_that_the_run_has_not_written_stays(
    pair: Path, tmp_path: Path, content: str | None, has_checkpoint: bool
) -> None:
    """A model, or a folder of the user's; no message says that it may be removed."""
    student = tmp_path / "student"
    student.mkdir()
    (student / ("config.json" if content else "notes.txt")).write_text(content or "mine")
    if has_checkpoint and content:
        checkpoint(pair, tmp_path)
    with pytest.raises(UserError, match=r"student.*give another") as raised:
        checkpoint_to_resume(plan(pair, tmp_path))
    assert "remove" not in str(raised.value)


def test_the_student_of_another_run_stays(pair: Path, tmp_path: Path) -> None:
    checkpoint(pair, tmp_path)
    student = tmp_path / "student"
    student.mkdir()
    (student / "config.json").write_text('{"model_type": "llama"}')
    (student / "manifest.json").write_text('{"written_by": "x", "run": "another"}')
    with pytest.raises(UserError, match=r"another run.*give another output_dir"):
        checkpoint_to_resume(plan(pair, tmp_path))


def test_the_student_is_not_written_over_a_model_of_the_run(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair / "student", tmp_path / "student")
    with pytest.raises(UserError, match=r"is or holds model\.student"):
        plan(pair, tmp_path, f"model.student={tmp_path / 'student'}")
