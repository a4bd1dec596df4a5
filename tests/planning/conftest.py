"""Runs of published models, from their configurations alone."""

from collections.abc import Callable

import pytest

from megatron_oprd.config.load import load_config
from megatron_oprd.config.schema import RunConfig
from tests.planning.models import EXAMPLES, model_folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """Loads the example of Qwen3-32B and Qwen3-4B, with the overrides that it is called with.

    Rollouts are those of transformers.
    """
    directory = tmp_path_factory.mktemp("models")
    models = [
        f"model.student={model_folder(directory, 'Qwen3-4B')}",
        f"model.teacher={model_folder(directory, 'Qwen3-32B')}",
        *("rollout.engine=hf", "rollout.max_batch_size=16"),
    ]

    def load(*overrides: str) -> RunConfig:
        return load_config(EXAMPLES / "qwen3_32b_to_4b.yaml", [*models, *overrides])

    return load
