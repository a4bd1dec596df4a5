"""Folders of published models whose weights are headers only: all that a dry run reads."""

import json
import math
import struct
from pathlib import Path

from megatron_oprd.models.families import mapping_table, read_architecture
from megatron_oprd.weights.hf_files import HFFolder
from tests.helpers.tiny import tiny_tokenizer
from tests.planning.models import model_folder

# A file is mapped whole when it is opened; the system refuses that if it is larger than memory.
PARAMETERS_A_FILE = 2 * 10**9


def save_stub_model(directory: Path, name: str, *, as_name: str | None = None) -> Path:
    """Writes ``name``'s published config.json, tensor names and shapes, and a small tokenizer.

    Files have their full length, and take no disk: the system keeps holes as holes.
    """
    folder = model_folder(directory / "published", name).rename(directory / (as_name or name))
    architecture = read_architecture(HFFolder(folder))
    table = mapping_table(architecture, padded_vocab_size=architecture.vocab_size)
    shapes = {tensor: shape for mapping in table for tensor, shape in mapping.hf.items()}
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for tensor, shape in shapes.items():
        if sum(map(math.prod, files[-1].values())) > PARAMETERS_A_FILE:
            files.append({})
        files[-1][tensor] = shape
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_header(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _write_header(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for tensor, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)


def num_parameters(folder: Path) -> int:
    """Parameters of a stub, from the lengths of its files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
        total += (file.stat().st_size - 8 - length) // 2
    return total
