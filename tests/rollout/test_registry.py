"""No file but an engine's own names it, and an engine that is registered works everywhere."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megatron_oprd import evaluate
from megatron_oprd.config.checks import check_values
from megatron_oprd.config.engines import EngineName
from megatron_oprd.config.engines.checks import ENGINE_CHECKS
from megatron_oprd.config.load import load_config
from megatron_oprd.config.schema import RolloutConfig, RunConfig
from megatron_oprd.config.setting import settings_of
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.errors import UserError
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.planning.activations import KERNELS
from megatron_oprd.planning.estimate import MemoryEstimate, estimate_memory, read_models
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.ladder import nearest_that_fits
from megatron_oprd.rollout.costs import EngineBytes, EngineLoad, MemoryChanges
from megatron_oprd.rollout.engine import Rollout, RolloutEngine, SamplingParams
from megatron_oprd.rollout.kind import EngineKind, Place
from megatron_oprd.rollout.recovery import EngineStarter
from megatron_oprd.rollout.registry import ENGINES
from megatron_oprd.rollout.served_model import ServedModel
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.rollouts import check_rollout_server, open_engines
from tests.data.test_benchmarks import row, write
from tests.helpers.pairs import config_of, save_pair
from tests.helpers.tiny import save_tiny_model, tiny_config
from tests.planning.models import EXAMPLES, model_folder

ROOT = Path(__file__).resolve().parents[2]
OWN = ("megatron_oprd/rollout/", "megatron_oprd/config/engines/")


def others() -> Iterator[tuple[str, str]]:
    """Path and content of every module that no engine has for itself."""
    for package in ("megatron_oprd", "checkpoint_tools"):
        for file in sorted((ROOT / package).rglob("*.py")):
            path = file.relative_to(ROOT).as_posix()
            if not path.startswith(OWN):
                yield path, file.read_text()


def test_no_other_file_names_an_engine() -> None:
    names = "|".join(ENGINES)
    compares = re.compile(rf"""engine\b[^\n]*(==|!=|\bin\b)\s*[\[({{]?\s*["']({names})["']""")
    # transformers, which is no extra, is also the library of the other models.
    packages = [word for k in ENGINES.values() if k.extras for word in (k.title, *k.extras)]
    named = re.compile("|".join(packages), re.IGNORECASE)
    found = [
        (path, match[0])
        for path, text in others()
        for match in (*compares.finditer(text), *named.finditer(text))
    ]
    assert not found
    assert len(list(others())) > 100


def test_settings_and_engines_have_the_same_names() -> None:
    assert get_args(EngineName) == tuple(ENGINES)
    assert ENGINE_CHECKS.keys() <= ENGINES.keys()
    keys = {found.key for found in settings_of(RunConfig())}
    for name, kind in ENGINES.items():
        assert kind.name == name
        for prefix in kind.may_change:
            assert any(key.startswith(prefix) for key in keys)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {e for k in ENGINES.values() for e in k.extras} <= {*extras["optional-dependencies"]}


def test_looking_one_up_is_cheap() -> None:
    code = (
        "import sys; from megatron_oprd.rollout.registry import ENGINES; "
        "print([m for m in ('transformers', 'megatron.core', 'vllm') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "[]\n"


class ToyEngine:
    """Answers every prompt with its own tokens."""

    def __init__(self) -> None:
        self.weights: list[str] = []
        self.version = -1

    def needs_all_weights(self) -> bool:
        return not self.weights

    def load_weights(
        self,
        stream: Iterable[tuple[str, Tensor]],
        *,
        version: int = 0,
        left_out: Collection[str] = (),
    ) -> None:
        self.weights, self.version = [name for name, _ in stream], version

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        return [
            Rollout(
                prompt_index=prompt.index,
                sample_index=sample,
                prompt_ids=prompt.token_ids,
                response_ids=prompt.token_ids,
                finished=True,
                weights_version=self.version,
            )
            for prompt in prompts
            for sample in range(sampling.samples_per_prompt)
        ]

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        self.weights = []


class ToyKind(EngineKind):
    """An engine with a process of its own on the trainer's first GPU."""

    name = "toy"
    title = "Toy"
    max_temperature = 1.5
    has_processes = True

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.checked: list[ServedModel] = []

    def place(self, rollout: RolloutConfig) -> Place:
        return "device"

    def check_server(self, rollout: RolloutConfig, model: ServedModel) -> None:
        self.checked.append(model)

    @contextmanager
    def open(
        self,
        rollout: RolloutConfig,
        model: ServedModel,
        context: ParallelContext,
        *,
        log_prefix: str,
    ) -> Iterator[EngineStarter]:
        self.opened.append(log_prefix)
        yield EngineStarter(owners=[0], create=ToyEngine)
        self.opened.pop()

    def alone(
        self,
        *,
        max_batch_size: int,
        device: torch.device,
        num_gpus: int = 1,
        server_url: str | None = None,
    ) -> RolloutConfig:
        return selecting_it(RolloutConfig(max_batch_size=max_batch_size))

    def create(
        self,
        rollout: RolloutConfig,
        model: ServedModel,
        *,
        device: torch.device,
        gpus: Sequence[str] = (),
    ) -> RolloutEngine:
        return ToyEngine()

    def memory(self, rollout: RolloutConfig, load: EngineLoad) -> EngineBytes:
        return EngineBytes(
            num_gpus=1,
            weights=load.num_weights * load.itemsize,
            kv_cache=(rollout.max_batch_size or 1) * 10**9,
            workspace=10,
            context=1,
            sleeps=True,
            num_tokens=10**6,
            max_model_len=load.length,
            num_responses=1,
            read_cache=10**9,
        )

    def memory_changes(self, rollout: RolloutConfig) -> MemoryChanges:
        return MemoryChanges(costly=[[("rollout.max_batch_size", 1)]])


def selecting_it(rollout: RolloutConfig) -> RolloutConfig:
    """The settings with ``engine: toy``, which a file could have if it were in `EngineName`."""
    rollout.engine = "toy"  # type: ignore[assignment]
    return rollout


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyKind:
    kind = ToyKind()
    monkeypatch.setitem(ENGINES, kind.name, kind)
    return kind


def test_a_run_with_another_engine(toy: ToyKind, tmp_path: Path, context: Any) -> None:
    config = config_of(save_pair(tmp_path / "pair", "llama", tied=True), [f"output_dir={tmp_path}"])
    selecting_it(config.rollout)
    check_values(config)
    plan = make_plan(config, world_size=1)
    check_rollout_server(plan)
    assert toy.checked[0].max_model_len == plan.layout.max_sequence_length
    context.device = torch.device("cpu")
    prompts = [Prompt(index=4, token_ids=(7, 8))]
    with open_engines(
        plan, context, lambda **_: iter([("w", torch.ones(3))]), log_prefix="here/"
    ) as engines:
        assert toy.opened == ["here/"]
        assert engines.sync(version=3) == 12
        rollouts = engines.generate(prompts, SamplingParams(max_new_tokens=2, seed=0))
    assert rollouts is not None
    assert [(one.response_ids, one.weights_version) for one in rollouts] == [((7, 8), 3)]
    assert not toy.opened


def test_an_evaluation_with_another_engine(
    toy: ToyKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "model", tiny_config("llama"), seed=0)
    write(tmp_path / "sums.jsonl", [row(f"{a}+{a}", str(2 * a)) for a in range(3)])

    def run(options: str) -> None:
        arguments = (
            f"--model {tmp_path}/model --data {tmp_path}/sums.jsonl --n 2 --engine toy "
            f"--max-new-tokens 4 --device cpu --output {tmp_path}/out {options}"
        )
        monkeypatch.setattr(sys, "argv", ["evaluate", *shlex.split(arguments)])
        assert evaluate.main() == 0

    run("")
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["settings"]["engine"] == "toy"
    assert len((tmp_path / "out/samples/model/sums.jsonl").read_text().splitlines()) == 6
    for options, message in (
        ("--temperature 1.6", "Toy takes at most 1.5"),
        ("--server-url http://127.0.0.1:1", "--server-url .* --engine toy; .*vllm"),
        ("--tensor-model-parallel-size 2", "parallel-size 2 needs --engine vllm without"),
    ):
        with pytest.raises(UserError, match=message):
            run(options)


def test_a_plan_with_another_engine(toy: ToyKind, tmp_path: Path) -> None:
    config = config_of_example(tmp_path)
    models, hardware = read_models(config), Hardware(memory_gb=60, tflops=1, bandwidth=1, mfu=1)

    def memory(memory_gb: float) -> MemoryEstimate:
        kernels = KERNELS["transformer_engine"]
        return estimate_memory(config, models, kernels, num_gpus=8, memory_gb=memory_gb)

    (everyone,) = memory(60).ranks
    assert everyone.phases["rollout"]["KV cache"] == 32 * 10**9
    assert "KV cache" not in everyone.phases["teacher"]
    assert not memory(60).fits(hardware)
    nearest = nearest_that_fits(config, models, KERNELS["transformer_engine"], hardware, num_gpus=8)
    assert nearest is not None


def config_of_example(folder: Path) -> RunConfig:
    models = [
        f"model.student={model_folder(folder, 'Qwen3-4B')}",
        f"model.teacher={model_folder(folder, 'Qwen3-32B')}",
    ]
    config = load_config(EXAMPLES / "qwen3_32b_to_4b.yaml", [*models, "rollout.max_batch_size=32"])
    selecting_it(config.rollout)
    check_values(config)
    return config
