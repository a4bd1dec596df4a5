"""megatron-core without a CUDA device, where packages of CUDA kernels are installed."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.ranks import ROOT, rank_environment


def test_kernel_packages_are_not_found(tmp_path: Path) -> None:
    for name in ("transformer_engine", "apex", "amp_C"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a device is needed')\n")
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import megatron_oprd.training.step\n"
            "from megatron.core.extensions.transformer_engine import HAVE_TE\n"
            "assert not HAVE_TE",
        ],
        env={**rank_environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        check=True,
    )
