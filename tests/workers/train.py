"""The entry point of training, as torchrun would start it."""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_oprd import train


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {arguments}."""
    with patch.object(sys, "argv", ["train", *case["arguments"]]):
        assert train.main() == 0
