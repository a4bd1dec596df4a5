"""Converts a GGUF file to a Hugging Face checkpoint folder.

    python -m checkpoint_tools.gguf_to_hf --gguf FILE --out DIR

transformers reads the file and dequantises its blocks. The folder gets plain weights, the config,
the generation config and the tokenizer with its chat templates. Metadata or tensors that
transformers would drop are errors.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.quantization_config import GgufConfig

from checkpoint_tools.common import DTYPES
from checkpoint_tools.gguf_metadata import (
    alone,
    ask_transformers,
    chat_templates,
    check_metadata,
    check_parts,
)
from megatron_oprd.errors import UserError, run_entry_point
from megatron_oprd.weights.casting import dtype_name
from megatron_oprd.weights.disk import describe_files
from megatron_oprd.weights.hf_files import CONFIG_FILE, HFCheckpoint
from megatron_oprd.weights.hf_writer import HFContent, write_hf_folder
from megatron_oprd.weights.output_folder import check_output_folder
from megatron_oprd.weights.safetensors_file import TensorSpec


def gguf_to_hf(gguf: Path, out: Path, *, dtype: torch.dtype, force: bool) -> HFCheckpoint:
    """Writes a GGUF file's model as a Hugging Face folder, whole or not at all; returns it opened.

    A `dtype` of float32 keeps the dequantised values exactly. Raises `UserError` if the file is
    missing or not GGUF, if transformers cannot read all of it, or if `out` is taken or cannot be
    written.
    """
    # On the meta device: errors and the required space are known before any weight is read.
    blank = blank_model(gguf)
    announced = _specs(plain_weights(blank.to(dtype)))
    check_output_folder(out, force=force, required_bytes=_num_bytes(announced), source=gguf)
    with alone(gguf) as folder:
        model, info = ask_transformers(
            gguf,
            lambda: AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=gguf.name,
                dtype=dtype,
                quantization_config=GgufConfig(dequantize=True),  # does not stay in the config
                output_loading_info=True,
            ),
        )
    if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
        raise UserError(
            f"GGUF file {gguf}: transformers could not place {len(wrong)} tensors of its "
            f"{blank.config.model_type} model, the first is {wrong[0]}."
        )
    weights = plain_weights(model)
    with tempfile.TemporaryDirectory() as scratch:
        content = HFContent(
            tensors=_specs(weights),
            config=_save_config_files(gguf, model, Path(scratch)),
            companion_files=sorted(file for file in Path(scratch).rglob("*") if file.is_file()),
            origin={
                "tool": "gguf_to_hf",
                "source": describe_files([gguf]),
                "dtype": dtype_name(dtype),
            },
        )
        write_hf_folder(out, content, weights.items(), force=force, show_progress=True)
    return HFCheckpoint(out)


def blank_model(gguf: Path) -> PreTrainedModel:
    """Builds a GGUF file's model on the meta device, and checks the file.

    Raises:
        UserError: The file is missing or not GGUF, has no tokenizer or an architecture or rope
            scaling that transformers does not read from GGUF, or its tensors hold more or fewer
            values than the model takes.
    """
    reader = _open_gguf(gguf)
    check_parts(gguf, reader)
    with alone(gguf) as folder:
        config = ask_transformers(
            gguf, lambda: AutoConfig.from_pretrained(folder, gguf_file=gguf.name)
        )
        # Also read here, so that an unreadable tokenizer is reported before the weights are read.
        ask_transformers(gguf, lambda: AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name))

    def build() -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    model = ask_transformers(gguf, build)
    check_metadata(gguf, reader, config)
    # transformers drops tensors it has no place for, so the number of values must match.
    stored = sum(int(tensor.n_elements) for tensor in reader.tensors)
    taken = sum(parameter.numel() for parameter in model.parameters())
    if stored != taken:
        others = [tensor.name for tensor in reader.tensors if not tensor.name.startswith("blk.")]
        raise UserError(
            f"GGUF file {gguf} holds {stored} values, but the {config.model_type} model that "
            f"transformers builds from its metadata takes {taken}; something in the file is not "
            f"supported (tensors outside the layers: {', '.join(others)})."
        )
    return model


def plain_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's weights under a Hugging Face checkpoint's names, tied ones once."""
    first: dict[int, str] = {}
    # keep_vars returns the parameters themselves, so tied ones have the same id.
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    untied = {name: state[name].detach() for name in first.values()}
    # Undoes transformers' renaming and fusing of tensors at load.
    return revert_weight_conversion(model, untied)


def _open_gguf(gguf: Path) -> GGUFReader:
    if not gguf.is_file():
        found = "it is a folder" if gguf.is_dir() else "it does not exist"
        raise UserError(f"--gguf {gguf}: {found}; give a .gguf file.")
    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"--gguf {gguf} is not a whole GGUF file ({gguf.stat().st_size} bytes): {error}."
        ) from error
    for field in ("general.architecture", "tokenizer.ggml.tokens"):
        if field not in reader.fields:
            raise UserError(
                f"GGUF file {gguf} has no {field} in its metadata; a complete language model's "
                "file is needed."
            )
    return reader


def _save_config_files(gguf: Path, model: PreTrainedModel, folder: Path) -> dict[str, object]:
    """Saves tokenizer and generation config into `folder`; returns the content of config.json."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    # transformers stores the file's general.name here; Hugging Face configs have no such field.
    config.pop("_model_name_or_path", None)
    # The folder's files become companion files; config.json is written by the writer.
    (folder / CONFIG_FILE).unlink()
    model.generation_config.save_pretrained(folder)
    with alone(gguf) as source:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    # transformers reads the default template only.
    if len(templates := chat_templates(GGUFReader(gguf))) > 1:
        tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder)
    return config


def _specs(weights: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(shape=tuple(tensor.shape), dtype=tensor.dtype)
        for name, tensor in weights.items()
    }


def _num_bytes(specs: dict[str, TensorSpec]) -> int:
    return sum(spec.num_bytes for spec in specs.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; `argv` defaults to the process's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_tools.gguf_to_hf",
        description="Convert a GGUF file to a Hugging Face checkpoint folder.",
    )
    parser.add_argument("--gguf", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="the folder to create")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="dtype of the weights (default: float32, which keeps the dequantised values exactly)",
    )
    parser.add_argument("--force", action="store_true", help="replace a checkpoint at --out")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written")
    args = parser.parse_args(argv)

    dtype = DTYPES[args.dtype]
    if args.dry_run:
        specs = _specs(plain_weights(blank_model(args.gguf).to(dtype)))
        check_output_folder(
            args.out, force=args.force, required_bytes=_num_bytes(specs), source=args.gguf
        )
        print(f"would write {args.out}: {len(specs)} tensors, {_num_bytes(specs)} bytes")
        return 0
    written = gguf_to_hf(args.gguf, args.out, dtype=dtype, force=args.force)
    print(f"{args.out}: {len(written.names())} tensors, {written.num_bytes()} bytes")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
