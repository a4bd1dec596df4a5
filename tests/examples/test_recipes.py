"""examples/recipes: a dry run of each on stubs of its models, its plan and its commands."""

import argparse
import importlib
import json
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from checkpoint_tools.common import LAYOUT_SIZES, layout_of
from checkpoint_tools.hf_to_megatron import Settings, megatron_content
from megatron_oprd import train
from megatron_oprd.bridge_build.config import load_build_config
from megatron_oprd.bridge_build.models import plan_build
from megatron_oprd.config.load import load_config
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.planning.activations import KERNELS
from megatron_oprd.planning.estimate import (
    MemoryEstimate,
    estimate_memory,
    estimate_work,
    read_models,
)
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.recommend import Lengths, recommend
from megatron_oprd.planning.time import StepSeconds
from tests.helpers.bridges import save_random_bridge
from tests.helpers.ranks import ROOT
from tests.helpers.stub_models import num_parameters, save_stub_model

pytestmark = pytest.mark.long

RECIPES = ROOT / "examples/recipes"
BUILDS = sorted(path.name for path in RECIPES.glob("*-build-bridge.yaml"))
RUNS = sorted({path.name for path in RECIPES.glob("*.yaml")} - set(BUILDS))
# Names in the recipes -> the published configuration.
MODELS = {
    "DeepSeek-R1-Distill-Qwen-1.5B": "DeepSeek-R1-Distill-Qwen-1.5B",
    "JustRL-DeepSeek-1.5B": "DeepSeek-R1-Distill-Qwen-1.5B",
    "Qwen3-1.7B-Base": "Qwen3-1.7B-Base",
    "Qwen3-4B": "Qwen3-4B",
    "Qwen3-4B-math": "Qwen3-4B",
    "Qwen3-4B-code": "Qwen3-4B",
    "Qwen3-8B": "Qwen3-8B",
    "Qwen3-32B": "Qwen3-32B",
    "Qwen3-235B-A22B": "Qwen3-235B-A22B",
    "Llama-3.1-8B-Instruct": "Llama-3.1-8B",
    "Llama-3.3-70B-Instruct": "Llama-3.1-70B-Instruct",
}
H100 = Hardware(memory_gb=80, tflops=989, bandwidth=3350, mfu=0.4)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, prompts and benchmarks of all recipes, as far as a dry run reads them."""
    root = tmp_path_factory.mktemp("recipes")
    for name, published in MODELS.items():
        save_stub_model(root, published, as_name=name)
    answer = {"reward_model": {"ground_truth": "2"}, "solution": "1+1=2"}
    rows = [
        {"prompt": f"{i}+1", "data_source": source, **answer}
        for i in range(64)
        for source in ("math", "code")
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run only asks whether vLLM is there."""
    monkeypatch.syspath_prepend(ROOT / "tests/fakes/vllm_stand_in")


def text_on(stubs: Path, name: str) -> str:
    text = (RECIPES / name).read_text().replace("/models/", f"{stubs}/")
    return re.sub(r"/data/[\w.-]+", f"{stubs}/rows.jsonl", text)


def on_stubs(stubs: Path, folder: Path, name: str) -> Path:
    """The recipe with the stubs' paths."""
    text = text_on(stubs, name)
    bridge = re.search(r"^bridge:\n +path: (\S+)$", text, re.MULTILINE)
    if bridge is not None:
        pair = folder / "pair"
        pair.mkdir()
        for role in ("student", "teacher"):
            model = re.search(rf"^  {role}: (\S+)$", text, re.MULTILINE)
            assert model is not None
            (pair / role).symlink_to(model[1])
        save_random_bridge(folder / "bridge", pair, rank=8, positions="last_k", k=2000)
        text = text.replace(bridge[1], str(folder / "bridge"))
    text = re.sub(r"^output_dir: .*$", f"output_dir: {folder}/out", text, flags=re.MULTILINE)
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    ("name", "count"), [("Qwen3-8B", 8_190_735_360), ("Qwen3-235B-A22B", 235_093_634_560)]
)
def test_parameters_are_those_published(stubs: Path, name: str, count: int) -> None:
    assert num_parameters(stubs / name) == count


@pytest.mark.parametrize("name", RUNS)
def test_dry_run(
    stubs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    config = on_stubs(stubs, tmp_path, name)
    monkeypatch.setenv("WORLD_SIZE", str(num_gpus(name)))
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(config), "--dry-run"])
    assert train.main() == 0
    assert f"train_iters: {load_config(config, []).train_iters}" in capsys.readouterr().out


@pytest.mark.parametrize("name", BUILDS)
def test_bridge_is_planned(stubs: Path, tmp_path: Path, name: str) -> None:
    config = load_build_config(on_stubs(stubs, tmp_path, name), [])
    plan = plan_build(config, world_size=8)
    assert plan is not None


def num_gpus(name: str) -> int:
    """Of the file's name: 2n8g is two nodes of eight GPUs."""
    found = re.search(r"-(\d+)n(\d+)g-", name)
    assert found is not None
    return int(found[1]) * int(found[2])


def step_of(estimate: MemoryEstimate) -> StepSeconds:
    """The time of a step with prompts and responses of the greatest length."""
    config = estimate.layout.config
    return estimate_work(
        estimate.layouts,
        H100,
        prompt_tokens=config.data.max_prompt_tokens,
        response_tokens=config.rollout.max_new_tokens,
    ).seconds


def planned(config: RunConfig, gpus: int) -> str:
    """The line of a recipe that says what ``plan`` says."""
    memory = partial(estimate_memory, kernels=KERNELS["transformer_engine"], memory_gb=80)
    estimate = memory(config, read_models(config), num_gpus=gpus)
    assert estimate.fits(H100)
    peak = max(rank.peak_bytes for rank in estimate.ranks)
    seconds = step_of(estimate)
    return (
        f"# Plan:      {gpus} GPUs of 80 GB: peak {peak / 1e9:.1f} GB, "
        f"{seconds.total:.0f} s a step, rollouts {seconds.rollout:.0f} s"
    )


# The others are left to the nightly run.
DAILY = ("r1-distill-qwen-1.5b-from-justrl-1.5b-1n8g-vanilla.yaml",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in DAILY)) for name in RUNS],
)
def test_the_plan_is_what_the_recipe_says(stubs: Path, tmp_path: Path, name: str) -> None:
    config = load_config(on_stubs(stubs, tmp_path, name), [])
    line = planned(config, num_gpus(name))
    assert line in (RECIPES / name).read_text().splitlines(), f"the plan is now: {line}"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in DAILY)) for name in RUNS],
)
def test_the_layout_is_the_first_that_is_recommended(
    stubs: Path, tmp_path: Path, name: str
) -> None:
    config = load_config(on_stubs(stubs, tmp_path, name), [])
    (first,) = recommend(
        config,
        read_models(config),
        KERNELS["transformer_engine"],
        H100,
        num_gpus=num_gpus(name),
        lengths=Lengths(
            prompt=config.data.max_prompt_tokens, response=config.rollout.max_new_tokens
        ),
        number=1,
    )
    assert str(first.change) == "", f"plan --recommend says {first.change}"


@pytest.mark.parametrize("name", RUNS)
def test_transformers_is_never_ahead(stubs: Path, tmp_path: Path, name: str) -> None:
    """Of the recipe's vLLM, with any batch of responses that fits beside the trainer."""
    text = on_stubs(stubs, tmp_path, name)
    gpus, config = num_gpus(name), load_config(text, [])
    memory = partial(estimate_memory, kernels=KERNELS["transformer_engine"], memory_gb=80)
    with_vllm = step_of(memory(config, read_models(config), num_gpus=gpus)).rollout
    most = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    plain = "rollout.vllm={gpu_memory_utilization: 0.4, tensor_model_parallel_size: 1}"
    for size in (most, 16, 4):
        overrides = [plain, "rollout.engine=hf", f"rollout.max_batch_size={size}"]
        other = load_config(text, overrides)
        estimate = memory(other, read_models(other), num_gpus=gpus)
        assert step_of(estimate).rollout > with_vllm, size


@pytest.mark.parametrize("name", RUNS)
def test_commands_name_the_recipe_and_its_folder(name: str) -> None:
    text = (RECIPES / name).read_text()
    output = re.search(r"^output_dir: (\S+)$", text, re.MULTILINE)
    assert output is not None
    head = text[: output.start()]
    assert f"examples/recipes/{name}\n" in head
    assert f"after={output[1]}/student" in head
    for file in re.findall(r"examples/\S+", head):
        assert (ROOT / file).exists(), file


STEPS = ["Convert", "Bridge", "Train", "Evaluate", "Export"]


def commands(name: str) -> dict[str, list[str]]:
    """The steps of a recipe's head in their order, each with its command's words, if it has one."""
    head = re.split(r"^output_dir:", (RECIPES / name).read_text(), flags=re.MULTILINE)[0]
    return {
        step: shlex.split(text) if text.startswith(("torchrun ", "python ", "sbatch ")) else []
        for step, text in re.findall(r"^# (\w+): +(.+)$", head, re.MULTILINE)
        if step in STEPS
    }


class ParsedError(Exception):
    """Ends a command when its arguments are parsed; they are its only argument."""


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, argparse.Namespace]:
    """Module and arguments of a command, as the module itself parses them."""
    if words[0] == "sbatch":
        file = next(Path(word).name for word in words if word.endswith(".sbatch"))
        rest = words[words.index(f"examples/slurm/{file}") + 1 :]
        # As the batch files do (tests/examples/test_launch.py).
        if file == "convert.sbatch":
            module, *arguments = f"checkpoint_tools.{rest[0]}", *rest[1:]
        else:
            module, *arguments = f"megatron_oprd.{Path(file).stem}", "--config", *rest
    else:
        module, *arguments = words[words.index("-m") + 1 :]
    original = argparse.ArgumentParser.parse_known_args

    def parse(self: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        found, unknown = original(self, *given, **named)
        assert not unknown
        raise ParsedError(found)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        with pytest.raises(ParsedError) as found:
            importlib.import_module(module).main()
    return module, found.value.args[0]


@pytest.mark.parametrize("name", RUNS)
def test_a_head_has_all_steps_in_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the recipe's own models, layout and folders."""
    config = yaml.safe_load((RECIPES / name).read_text())
    steps = commands(name)
    assert list(steps) == STEPS
    path = config.get("bridge", {}).get("path")
    assert bool(steps["Bridge"]) == (path is not None)
    found = {step: parsed(words, monkeypatch) for step, words in steps.items() if words}
    module, convert = found["Convert"]
    assert module == "checkpoint_tools.hf_to_megatron"
    assert str(convert.hf) == config["model"]["teacher"]
    assert f"model.teacher={convert.out}\n" in (RECIPES / name).read_text()
    parallel = config.get("parallel", {})
    sizes = {size: parallel[size] for size in LAYOUT_SIZES if size in parallel}
    assert layout_of(convert) == ParallelLayout(**sizes)
    if path is not None:
        module, bridge = found["Bridge"]
        assert module == "megatron_oprd.build_bridge"
        assert yaml.safe_load((ROOT / bridge.config).read_text())["output_dir"] == path
    module, train_ = found["Train"]
    assert module == "megatron_oprd.train"
    assert ROOT / train_.config == RECIPES / name
    module, evaluate = found["Evaluate"]
    assert module == "megatron_oprd.evaluate"
    assert f"{config['output_dir']}/evaluation" == str(evaluate.output)
    module, export = found["Export"]
    assert module == "checkpoint_tools.megatron_to_hf"
    assert str(export.megatron) == config["output_dir"]


@pytest.mark.parametrize("name", RUNS)
def test_the_teacher_can_be_converted(
    stubs: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the recipe's layout, as far as the converter's dry run looks without asking for disk."""
    _, convert = parsed(commands(name)["Convert"], monkeypatch)
    settings = Settings(layout=layout_of(convert))
    content = megatron_content(open_checkpoint(stubs / convert.hf.name), settings)
    assert content.num_bytes > 2 * num_parameters(stubs / convert.hf.name)
