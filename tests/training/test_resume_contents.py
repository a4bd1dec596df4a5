"""A run goes on from whole checkpoints only, and only with what it began with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

from checkpoint_tools.verify import main as verify
from megatron_oprd.errors import EXIT_STOPPED
from tests.helpers.closeness import assert_close_relative
from tests.helpers.pairs import LINEAR_UPDATES, save_pair
from tests.helpers.ranks import run_ranks

DATED = (
    "{{ '<user>' + strftime_now('%d %b %Y') + eos_token }}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SETTINGS = ["train_iters=4", "checkpoint.save_interval=2", "data.chat_template=true"]
MIDDLE = "checkpoints/step_0000002"
NEWEST = "checkpoints/step_0000004"


def shard(out: Path) -> Path:
    return max((out / NEWEST).glob("*.distcp"), key=lambda file: file.stat().st_size)


def truncated(out: Path) -> Path:
    file = shard(out)
    file.write_bytes(file.read_bytes()[:-100])
    return file


def missing_metadata(out: Path) -> Path:
    (out / NEWEST / ".metadata").unlink()
    return out / NEWEST / ".metadata"


def missing_format(out: Path) -> Path:
    (out / NEWEST / "metadata.json").unlink()
    return out / NEWEST / "metadata.json"


def flipped(out: Path) -> Path:
    file = shard(out)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 255 for byte in content[middle : middle + 8])
    file.write_bytes(content)
    return file


def other_manifest(out: Path) -> Path:
    (out / NEWEST / "manifest.json").write_text("{")
    return out / NEWEST / "manifest.json"


DAMAGES: dict[str, Callable[[Path], Path]] = {
    one.__name__: one
    for one in (truncated, missing_metadata, missing_format, flipped, other_manifest)
}


def other_prompts(pair: Path) -> None:
    (pair / "prompts.jsonl").write_text('{"prompt": "another one"}\n' * 16)


def other_teacher(pair: Path) -> None:
    file = pair / "teacher" / "model.safetensors"
    weights = load_file(file)
    save_file({name: 1.5 * weight for name, weight in weights.items()}, file, {"format": "pt"})


def other_template(pair: Path) -> None:
    file = pair / "teacher" / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "other_prompts": (other_prompts, "the prompts (data.prompts"),
    "other_teacher": (other_teacher, "the weights (model.teacher)"),
    "other_template": (other_template, "its chat template (model.teacher)"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("contents")
    pair = save_pair(root / "pair", "llama")
    for model in ("student", "teacher"):
        (pair / model / "chat_template.jinja").write_text(DATED)

    def case(models: Path, out: Path, *overrides: str, code: int = 0) -> dict[str, Any]:
        arguments = ["--config", str(models / "run.yaml"), f"output_dir={out}"]
        folders = [f"model.{one}={models / one}" for one in ("student", "teacher")]
        arguments += [*folders, f"data.prompts=[{models / 'prompts.jsonl'}]", *SETTINGS]
        return {
            "program": "megatron_oprd.train",
            "arguments": [*arguments, *LINEAR_UPDATES, *overrides],
            "code": code,
        }

    run_ranks("entry_point", [case(pair, root / "whole")], 1, root / "ranks.whole")
    cases = []
    for name, damage in DAMAGES.items():
        shutil.copytree(root / "whole", root / name)
        shutil.rmtree(root / name / "student")
        damage(root / name)
        cases.append(case(pair, root / name))
    shutil.copytree(root / "truncated", root / "kept")
    stops = ["checkpoint.keep=1", "checkpoint.exit_after_minutes=1e-9"]
    cases.append(case(pair, root / "kept", *stops, code=EXIT_STOPPED))
    run_ranks("entry_point", cases, 1, root / "ranks.damaged")
    for name, (change, _) in CHANGES.items():
        shutil.copytree(root / "whole", root / name)
        shutil.copytree(pair, root / f"pair.{name}")
        change(root / f"pair.{name}")
        cases = [case(root / f"pair.{name}", root / name, code=2)]
        run_ranks("entry_point", cases, 1, root / f"ranks.{name}")
    # Moved, with other settings of what reads nothing; and longer, on a later day.
    for name in ("moved", "another_day", "longer"):
        shutil.copytree(root / "whole", root / name)
    shutil.copytree(pair, root / "pair.moved")
    manifest = root / "longer" / NEWEST / "manifest.json"
    counted = json.loads(manifest.read_text()) | {"skipped_steps": 3, "unsupervised_steps": 2}
    manifest.write_text(json.dumps(counted))
    manifest = root / "another_day" / NEWEST / "manifest.json"
    content = json.loads(manifest.read_text())
    content["run"]["day"] = "2020-01-02"
    manifest.write_text(json.dumps(content))
    shutil.rmtree(root / "another_day" / MIDDLE)
    cases = [
        case(root / "pair.moved", root / "moved"),
        case(pair, root / "longer", "train_iters=6"),
        case(pair, root / "another_day", code=2),
        case(pair, root / "moved", "data.chat_template_kwargs={tone: kind}", code=2),
    ]
    run_ranks("entry_point", cases, 1, root / "ranks.others")
    return root


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def log(root: Path, name: str) -> str:
    return (root / f"ranks.{name}" / "rank_0_of_1.log").read_text()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_checkpoint_is_named_and_passed_over(root: Path, name: str) -> None:
    out = root / name
    assert f"{out / NEWEST} is not whole and is passed over: " in log(root, "damaged")
    assert [record["step"] for record in records(out)] == [0, 1, 2, 3]
    expected = load_file(root / "whole" / "student" / "model.safetensors")
    for key, tensor in load_file(out / "student" / "model.safetensors").items():
        assert_close_relative(tensor, expected[key], 1e-6, what=key)
    assert (out / "checkpoints" / "step_0000004.aside-1").is_dir()


def test_a_broken_checkpoint_does_not_count_among_those_that_are_kept(root: Path) -> None:
    kept = sorted(path.name for path in (root / "kept" / "checkpoints").iterdir())
    assert kept == ["step_0000003", "step_0000004.aside-1"]


def test_other_template_kwargs_are_refused(root: Path) -> None:
    assert "data.chat_template_kwargs = {}, now it is {'tone': 'kind'}" in log(root, "others")


@pytest.mark.parametrize("name", ["truncated", "missing_metadata", "flipped"])
def test_the_damaged_file_is_named(root: Path, name: str) -> None:
    whole = root / "whole"
    names = {"truncated": shard(whole).name, "missing_metadata": ".metadata"}
    line = next(
        line
        for line in log(root, "damaged").splitlines()
        if line.startswith(f"{root / name / NEWEST} is not whole")
    )
    assert names.get(name, shard(whole).name) in line


def test_verify_reads_a_training_checkpoint(root: Path, tmp_path: Path) -> None:
    assert verify([str(root / "whole" / NEWEST)]) == 0
    shutil.copytree(root / "whole" / NEWEST, tmp_path / "step_0000004")
    file = max(tmp_path.glob("*/*.distcp"), key=lambda one: one.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert verify([str(tmp_path / "step_0000004")]) == 1


@pytest.mark.parametrize("name", CHANGES)
def test_other_contents_are_refused(root: Path, name: str) -> None:
    assert CHANGES[name][1] in log(root, name)
    assert "give the old one" in log(root, name).lower()
    assert records(root / name) == records(root / "whole")


def test_a_later_resume_renders_the_first_day(root: Path) -> None:
    """The run's day was changed behind its back: with that day its prompts are others."""
    assert "the prompts (data.prompts" in log(root, "others")


def test_moved_files_are_the_same_run(root: Path) -> None:
    assert records(root / "moved") == records(root / "whole")


def test_a_longer_run_keeps_its_schedule(root: Path) -> None:
    before, after = records(root / "whole"), records(root / "longer")
    assert [record["lr"] for record in after[:4]] == [record["lr"] for record in before]
    # Cosine from 0.1 to 0 over 4 updates, of which the fifth and the sixth are past the end.
    assert after[4]["lr"] == after[5]["lr"] == 0.0
    assert before[3]["lr"] > 0
    assert "optimizer.lr_decay_iters = 4" in log(root, "others")
    # What was counted before goes on from there.
    assert (after[5]["skipped_steps"], after[5]["unsupervised_steps"]) == (3, 2)


def test_manifests_say_what_was_written(root: Path) -> None:
    manifest = json.loads((root / "whole" / NEWEST / "manifest.json").read_text())
    found = {
        str(file.relative_to(root / "whole" / NEWEST)): file.stat().st_size
        for file in (root / "whole" / NEWEST).rglob("*")
        if file.is_file() and file.name != "manifest.json"
    }
    assert {name: size for name, (size, _) in manifest["files"].items()} == found
    student = json.loads((root / "whole" / "student" / "manifest.json").read_text())
    assert student["run"] == manifest["run"]["name"]
    assert "GB in" in log(root, "whole")


def test_optimizer_states_are_written_once(root: Path) -> None:
    """fp32 weights are their own main parameters: weights and two moments are all there is."""
    weights = load_file(root / "whole" / "student" / "model.safetensors")
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    found = sum(file.stat().st_size for file in (root / "whole" / NEWEST).glob("*.distcp"))
    padding = (128 - 97) * 32 * 4 * 2
    assert num_bytes * 2.2 < found < 3.3 * (num_bytes + padding) + 200_000
    # In common.pt, or since megatron-core 0.19 in the shards.
    common = dist_checkpointing.load_common_state_dict(str(root / "whole" / NEWEST))
    assert common["scheduler_steps"] == 4
