"""A run that starts from Megatron checkpoints is the run that starts from Hugging Face folders."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from megatron_oprd.errors import UserError
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.training.plan import make_plan
from megatron_oprd.weights.megatron_checkpoint import MegatronCheckpoint
from tests.helpers.pairs import config_of, save_pair
from tests.helpers.ranks import run_ranks

PP2 = "parallel.pipeline_model_parallel_size=2"


def megatron(root: Path) -> list[str]:
    return [f"model.{name}={root / f'{name}_in_megatron'}" for name in ("student", "teacher")]


def foreign(root: Path) -> list[str]:
    """The checkpoints of another Megatron run, and where the models' configurations are."""
    folders = [f"model.{name}={root / f'{name}_foreign'}" for name in ("student", "teacher")]
    return folders + [
        f"model.{name}_hf_config={root / 'pair' / name}" for name in ("student", "teacher")
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("megatron_start")
    pair = save_pair(root / "pair", "qwen2", teacher_layers=6)
    layout = ParallelLayout(tensor_model_parallel_size=2)
    for name in ("student", "teacher"):
        converted = hf_to_megatron(
            pair / name, root / f"{name}_in_megatron", Settings(layout=layout)
        )
        foreign = shutil.copytree(converted / "release", root / f"{name}_foreign")
        shutil.rmtree(foreign / "hf")
    return root


def test_the_same_run(root: Path) -> None:
    def case(name: str, overrides: list[str]) -> dict[str, Any]:
        return {"name": name, "pair": str(root / "pair"), "overrides": [PP2, *overrides]}

    cases = [case("hf", []), case("megatron", megatron(root)), case("foreign", foreign(root))]
    run_ranks("step", cases, 2, root)
    expected = torch.load(root / "hf.pt")
    for name in ("megatron", "foreign"):
        found = torch.load(root / f"{name}.pt")
        assert torch.equal(found["loss"], expected["loss"])
        for tensor, values in expected["weights"].items():
            assert isinstance(values, Tensor)
            assert torch.equal(found["weights"][tensor], values), tensor


def test_everything_else_comes_from_the_companion_files(root: Path, tmp_path: Path) -> None:
    """Tokenizer and generation config; the Hugging Face folders may be gone."""
    config = config_of(root / "pair", [*megatron(root), f"output_dir={tmp_path}"])
    plan = make_plan(config, world_size=1)
    assert isinstance(plan.student_checkpoint, MegatronCheckpoint)
    assert plan.student_checkpoint.hf_folder == root / "student_in_megatron" / "release" / "hf"
    assert plan.tokenizer.name_or_path == str(plan.student_checkpoint.hf_folder)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_missing_configuration_names_its_setting(root: Path, which: str) -> None:
    overrides = [o for o in foreign(root) if not o.startswith(f"model.{which}_hf_config")]
    with pytest.raises(UserError, match=rf"{which}_foreign carries no .* with model\.{which}_hf_"):
        make_plan(config_of(root / "pair", overrides), world_size=1)
