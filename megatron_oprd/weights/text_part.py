"""Reads the decoder in the folder of a model with more parts, as if it were a model of its own."""

import json
import os
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from typing_extensions import override

from megatron_oprd.weights.hf_files import CONFIG_FILE, HFCheckpoint, copy_companions

# Files that say how images become tokens.
_OF_OTHER_PARTS = {"preprocessor_config.json", "processor_config.json"}


class TextPart(HFCheckpoint):
    """A decoder's tensors and configuration, under the names of a decoder alone.

    Args:
        folder: The whole model's.
        config: The decoder's config.json.
        prefix: In front of the names of the decoder's tensors.
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
        others: tuple[str, ...],
    ) -> None:
        super().__init__(folder)
        self.config = config
        every = len(self.names())
        self.leave_out(others)
        self.num_left_out = every - len(self.names())
        self.rename(
            {name: name.removeprefix(prefix) for name in self.names() if name.startswith(prefix)}
        )

    @property
    @override
    def hf_folder(self) -> Path:
        """A folder with the decoder's config.json and companion files; gone with this object."""
        # Tokenizers, engines and converters read the configuration by path, and that of the whole
        # model would make them build all of it.
        return Path(self._written.name)

    @cached_property
    def _written(self) -> TemporaryDirectory[str]:
        written = TemporaryDirectory(prefix="decoder-of-")
        (Path(written.name) / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n")
        copy_companions(self.companion_files(), Path(written.name))
        return written

    @override
    def companion_files(self) -> list[Path]:
        """The files to copy into the folder of the exported decoder."""
        return [file for file in super().companion_files() if file.name not in _OF_OTHER_PARTS]
