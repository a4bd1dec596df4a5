"""The commands for vLLM's servers in the documentation, read by vLLM's own parser."""

import re
import shlex

import pytest

from tests.helpers.ranks import ROOT


def commands() -> list[list[str]]:
    """The arguments of every ``vllm serve`` in a block of docs/rollouts.md, the model first."""
    text = (ROOT / "docs" / "rollouts.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [
        shlex.split(line.partition("vllm serve ")[2]) for line in lines if "vllm serve " in line
    ]


def test_there_are_some() -> None:
    found = commands()
    assert len(found) == 4
    assert sum("--headless" in one for one in found) == 1


@pytest.mark.parametrize("command", commands(), ids=range(len(commands())))
def test_vllm_reads_it(command: list[str]) -> None:
    """An unknown option, or a value of the wrong kind, ends the parser."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
    assert found.model_tag == "STUDENT"
    assert found.worker_extension_cls.endswith("WeightReceiver")
    assert found.weight_transfer_config.backend == "nccl"
