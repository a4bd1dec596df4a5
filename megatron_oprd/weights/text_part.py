"""Reads the decoder in the folder of a model with more parts, as if it were a model of its own."""

import os
from pathlib import Path
from typing import Any

from typing_extensions import override

from megatron_oprd.weights.hf_files import HFCheckpoint

# Files that say how images become tokens.
_OF_OTHER_PARTS = {"preprocessor_config.json", "processor_config.json"}


class TextPart(HFCheckpoint):
    """A decoder's tensors and configuration, under the names of a decoder alone.

    Args:
        folder: The whole model's.
        config: The decoder's config.json.
        prefix: In front of the names of the decoder's tensors.
        plain_prefix: In its place in a decoder alone.
        others: Beginnings of the names of the other parts' tensors. A tensor that is neither keeps
            its name, so that it is reported as left over.

    Attributes:
        num_left_out: The number of the other parts' tensors.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        config: dict[str, Any],
        prefix: str,
        plain_prefix: str = "",
        others: tuple[str, ...],
    ) -> None:
        super().__init__(folder)
        every = len(self.names())
        self.leave_out(others)
        self.num_left_out = every - len(self.names())
        self.rename(
            {
                name: plain_prefix + name.removeprefix(prefix)
                for name in self.names()
                if name.startswith(prefix)
            }
        )
        self.replace_config(config)

    @override
    def companion_files(self) -> list[Path]:
        """The files to copy into the folder of the exported decoder."""
        return [file for file in super().companion_files() if file.name not in _OF_OTHER_PARTS]
