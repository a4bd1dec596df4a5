"""Servers that two nodes start for a run, with a stand-in."""

import contextlib
import json
from pathlib import Path

import psutil

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_config


def test_each_node_looks_after_its_own(tmp_path: Path) -> None:
    """One that is killed is started again by its node, and all ranks learn of one that does not."""
    config = tiny_config("llama")
    described = {
        "config": json.loads(config.to_json_string(use_diff=False)),
        "dtype": "float32",
        "max_model_len": 64,
        "logprobs_mode": "raw_logprobs",
    }
    folders = [tmp_path / f"model_{rank}" for rank in range(2)]
    for folder in folders:
        config.save_pretrained(folder)
        (folder / "described.json").write_text(json.dumps(described))
        (folder / "behaviour").write_text("serve")
    run_ranks("server_nodes", [{"folders": [str(folder) for folder in folders]}], 2, tmp_path)

    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    listened = []
    for folder in folders:
        started = json.loads((folder / "started_1.json").read_text())
        options = started["options"]
        assert options[options.index("--host") + 1] == "127.0.0.1"
        listened.append(f"http://127.0.0.1:{options[options.index('--port') + 1]}")
        assert started["environment"]["MEGATRON_OPRD_SERVER_SECRET"] == first["secret"]
    # The second node's rank owns no engine.
    assert (first["urls"], second["urls"]) == (listened, [])
    assert first["secret"] == second["secret"]

    # Nobody has started the first node's server again.
    starts = [len(list(folder.glob("started_*.json"))) for folder in folders]
    assert starts[0] == 1
    assert starts[1] >= 3
    assert first["error"] == second["error"]
    for part in (
        "rollout engine 0 failed and was not started again (1 restarts in this step",
        "the vLLM server ended with exit code 3 while it started; the end of",
        f"vllm_server_1.log:\nstart {starts[1]}\nout of memory",
        f"output is in {tmp_path}/vllm_server_0.log, {tmp_path}/vllm_server_1.log",
    ):
        assert part in first["error"]
    for file in (file for folder in folders for file in folder.glob("started_*.json")):
        for pid in json.loads(file.read_text())["pids"]:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).wait(timeout=30)  # what was killed may not be gone at once
