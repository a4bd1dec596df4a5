"""Opens a bridge: this project's folder, or the reference implementation's file."""

from pathlib import Path

from megatron_oprd.bridge.format import BridgeFolder
from megatron_oprd.bridge.ps_bank import PSBank
from megatron_oprd.bridge.source import BridgeSource


def open_bridge(path: Path) -> BridgeSource:
    """Opens a bridge: a folder of this format, or the reference implementation's ps_bank.pt.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    return PSBank(path) if path.suffix == ".pt" else BridgeFolder(path)
