"""The self-test's part for this engine, and an engine that keeps its first weights."""

from pathlib import Path

import pytest

from tests.selftest.test_selftest import self_test

pytestmark = pytest.mark.slow
STALE = """
from megatron_oprd.rollout.vllm.engine import VLLMEngine

load_weights = VLLMEngine.load_weights
first = []

def stale(engine, stream, **arguments):
    weights = [(name, tensor.clone()) for name, tensor in stream]
    first.extend(weights if not first else [])
    load_weights(engine, iter(first), **arguments)

VLLMEngine.load_weights = stale
"""


@pytest.mark.parametrize(("breaks", "status"), [("", "ok"), (STALE, "failed")])
def test_weights_after_syncs(tmp_path: Path, breaks: str, status: str) -> None:
    code, results, printed = self_test(tmp_path, 1, "rollouts", breaks=breaks)
    assert [one["status"] for one in results] == [status], printed
    assert code == (status == "failed")
    if breaks:
        assert "after the sync of step 1" in results[0]["found"]
