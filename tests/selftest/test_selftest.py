"""The self-test passes where all is right, and names the part where something is broken."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import rank_environment

# Python runs it in every process that starts, before anything else.
BREAKS = "sitecustomize.py"
# A sum over the ranks is taken over a group of this rank alone.
WRONG_GROUP = """
import torch.distributed as dist
from megatron_oprd.training import step

class Wrong:
    def __getattr__(self, name):
        return getattr(dist, name)

    def all_reduce(self, tensor):
        pass

step.dist = Wrong()
"""
DROPPED_SCALE = """
import dataclasses
import torch
from megatron_oprd.models import fp8_codes

decode = fp8_codes.decode

def without_scales(stored, scales, *arguments):
    ones = torch.ones_like(scales.values)
    return decode(stored, dataclasses.replace(scales, values=ones), *arguments)

fp8_codes.decode = without_scales
"""
# Cases of their own, with a fault on one rank.
CASES = """
import os, sys, time, types
import torch.distributed as dist

def run(arguments, place):
    dist.init_process_group("gloo")
    rank = os.environ["RANK"]
    if arguments.get("killed") == rank:
        os.kill(os.getpid(), 9)
    if arguments.get("raises") == rank:
        raise ValueError("a sentence")
    if arguments.get("hangs") == rank:
        time.sleep(600)
    dist.barrier()
    dist.destroy_process_group()
    return "as it should be"

sys.modules["megatron_oprd.selftest.own"] = types.SimpleNamespace(run=run)
"""
RUN_CASES = """
import dataclasses, json, sys, time
from pathlib import Path
from megatron_oprd.selftest import agents
from megatron_oprd.selftest.cases import Case

folder = Path(sys.argv[1])
of_all = agents.Agents(ranks_per_device=2)
cases = [
    Case(part="own", name=str(one), kind="own", num_ranks=2, arguments=one, seconds=5)
    for one in ({}, {"hangs": "1"}, {"killed": "0"}, {"raises": "1"}, {})
]
found = of_all.run(cases, models=folder, folder=folder, end=time.monotonic() + 300)
late = of_all.run(cases[:1], models=folder, folder=folder, end=time.monotonic())
of_all.close()
print(json.dumps([dataclasses.asdict(one) for one in found + late]))
"""


def python(tmp_path: Path, *arguments: str, breaks: str = "") -> subprocess.CompletedProcess[str]:
    """Runs Python with the package, and with something broken."""
    (tmp_path / BREAKS).write_text(breaks)
    environment = rank_environment()
    environment["PYTHONPATH"] = f"{tmp_path}:{environment['PYTHONPATH']}"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def self_test(
    tmp_path: Path, ranks: int, *parts: str, breaks: str = ""
) -> tuple[int, list[dict[str, Any]], str]:
    """The exit code, the results and what was printed."""
    done = python(
        tmp_path,
        *("-m", "megatron_oprd.selftest", "--ranks-per-gpu", str(ranks), "--output", "out"),
        *(word for part in parts for word in ("--part", part)),
        breaks=breaks,
    )
    files = list((tmp_path / "out").glob("*/results.json"))
    results = json.loads(files[0].read_text())["results"] if files else []
    return done.returncode, results, done.stdout + done.stderr


def test_two_ranks(tmp_path: Path) -> None:
    code, results, printed = self_test(tmp_path, 2, "versions", "fabric")
    assert code == 0, printed
    assert {one["status"] for one in results} == {"ok"}
    assert {one["name"] for one in results if one["num_ranks"] == 2} == {"all ranks"}


@pytest.mark.slow
def test_experts_on_two_ranks(tmp_path: Path) -> None:
    code, results, printed = self_test(tmp_path, 2, "versions", "fabric", "layouts, experts")
    assert code == 0, printed
    assert {one["status"] for one in results} == {"ok"}
    assert {one["name"] for one in results if one["num_ranks"] == 2} == {
        "all ranks",
        "EP 2",
        "TP 2, ETP 1, EP 2",
    }
    assert "EP 2" in printed


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_all_parts(tmp_path: Path, ranks: int) -> None:
    code, results, printed = self_test(tmp_path, ranks)
    assert code == 0, printed
    skipped = [one["name"] for one in results if one["status"] == "skipped"]
    assert "one rank" not in skipped


@pytest.mark.parametrize(
    ("breaks", "ranks", "part", "failing"),
    [
        pytest.param(
            DROPPED_SCALE, 1, "FP8 teacher, block_128", {"one rank"}, marks=pytest.mark.slow
        ),
        pytest.param(
            WRONG_GROUP,
            2,
            "layouts, fp32",
            # With tensor parallelism each rank has a part of the positions, with stages of the
            # layers, and so on: all but what one rank does.
            {
                "TP 2",
                "PP 2",
                "PP 2, VPP 2, full recompute",
                "CP 2",
                "DP 2, overlap",
                "TP 2, packed",
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dropped_scale", "wrong_group"],
)
def test_what_is_broken_is_named(
    tmp_path: Path, breaks: str, ranks: int, part: str, failing: set[str]
) -> None:
    code, results, printed = self_test(tmp_path, ranks, part, breaks=breaks)
    assert code == 1
    failed = [one for one in results if one["status"] == "failed"]
    assert {(one["part"], one["name"]) for one in failed} == {(part, name) for name in failing}
    for one in failed:
        assert "loss differs by" in one["found"]
        assert f"{part}: {one['name']}" in printed


@pytest.mark.slow
def test_a_case_that_fails_stops_no_other(tmp_path: Path) -> None:
    done = python(tmp_path, "-c", RUN_CASES, str(tmp_path), breaks=CASES)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [one["status"] for one in results] == [
        "ok",
        "failed",
        "failed",
        "failed",
        "ok",
        "not run",
    ]
    hung, killed, raised = (one["found"] for one in results[1:4])
    assert "no end after 5 seconds" in hung
    assert "rank 0: exit code -9" in killed
    assert "ValueError: a sentence" in raised


def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    code, _, printed = self_test(tmp_path, 1, "layout, fp32")
    assert code == 2
    assert "--part layout, fp32" in printed
    assert "layouts, fp32" in printed
