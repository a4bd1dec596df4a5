from pathlib import Path

import pytest

from megatron_oprd.bridge_build.config import load_build_config
from megatron_oprd.errors import UserError
from tests.helpers.ranks import ROOT

EXAMPLE = ROOT / "examples/recipes/qwen3-1.7b-base-from-qwen3-4b-1n8g-build-bridge.yaml"


def test_example() -> None:
    config = load_build_config(EXAMPLE)
    assert config.num_steps == 25
    run = config.as_run()
    assert (run.train_iters, run.taps.k, run.bridge.path) == (25, 2000, None)


def test_example_of_the_demo() -> None:
    config = load_build_config(ROOT / "examples" / "bridge_demo.yaml")
    assert config.fit.num_prompts == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fit.ranks=[]", r"fit\.ranks is empty"),
        ("fit.ranks=[4,0]", r"fit\.ranks = \[4, 0\]"),
        ("fit.num_prompts=2001", r"2001 is not a multiple of rollout\.prompts_per_step = 80"),
        ("fit.ridge=0", r"fit\.ridge = 0\.0 .*has to be above 0"),
        ("fit.held_out_share=1", r"fit\.held_out_share = 1\.0"),
        ("fit.max_rows=0", r"fit\.max_rows = 0"),
        ("fit.max_rows=20000000", r"fit\.max_rows = 20000000 .* 1 to 16777216"),
        ("fit.epochs=3", r"fit\.epochs = 3 .*fit\.method = least_squares; use gradient"),
        ("fit.lr=0.1", r"fit\.lr = 0\.1 .*fit\.method = least_squares; use gradient"),
        ("fit.batch_rows=8", r"fit\.batch_rows = 8 .*fit\.method = least_squares; use gradient"),
        ("fit.rank=4", r"unknown setting 'fit\.rank'; the nearest is 'fit\.ranks'"),
        ("optimizer.lr=1", r"unknown setting 'optimizer'"),
        ("batch.sequence_packing=true", r"batch\.sequence_packing"),
        ("teacher.max_tokens=32768", r"teacher\.max_tokens = 32768 has no effect"),
        ("teacher.target_memory_gb=4", r"teacher\.target_memory_gb = 4\.0 has no effect"),
        ("taps.k=null", r"taps\.positions = last_k needs taps\.k"),
        ("output_dir=", "setting output_dir"),
    ],
)
def test_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_build_config(EXAMPLE, [override])


def test_settings_of_the_other_method() -> None:
    gradient = ["fit.method=gradient", "fit.epochs=3", "fit.lr=0.1", "fit.batch_rows=8"]
    assert load_build_config(EXAMPLE, gradient).fit.epochs == 3
    with pytest.raises(UserError, match=r"fit\.ridge = 0\.1 .*fit\.method = gradient; use least_"):
        load_build_config(EXAMPLE, [*gradient, "fit.ridge=0.1"])
