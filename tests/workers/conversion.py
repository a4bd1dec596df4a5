"""Conversions that processes share, as under torchrun; rank 0 reports which rank wrote what."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

from checkpoint_tools.hf_to_megatron import Settings, hf_to_megatron
from megatron_oprd.errors import UserError
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.weights import torch_dist_plan, torch_dist_writer
from megatron_oprd.weights.distcp_file import write_file
from megatron_oprd.weights.ranks import conversion_ranks

SETTINGS = Settings(
    layout=ParallelLayout(tensor_model_parallel_size=2), make_vocab_size_divisible_by=8
)


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {hf, out, file_bytes, taken}; converting to ``taken`` has to fail."""
    written: list[str] = []

    def noting(path: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        written.append(path.name)
        return write_file(path, *arguments, **options)

    with (
        patch.object(torch_dist_writer, "write_file", noting),
        patch.object(
            torch_dist_plan.plan_files, "__kwdefaults__", {"max_file_bytes": case["file_bytes"]}
        ),
        conversion_ranks() as ranks,
    ):
        hf_to_megatron(Path(case["hf"]), directory / case["out"], SETTINGS, ranks=ranks)
        error = None
        try:
            hf_to_megatron(Path(case["hf"]), directory / case["taken"], SETTINGS, ranks=ranks)
        except UserError as found:
            error = str(found)
        report = {"written": ranks.gather(written), "errors": ranks.gather(error)}
        if ranks.rank == 0:
            (directory / f"{case['out']}.json").write_text(json.dumps(report))
