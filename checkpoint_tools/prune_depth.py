"""Makes a shallower student of a model by keeping some of its layers, unchanged.

    python -m checkpoint_tools.prune_depth --hf DIR --out DIR --num-layers 24
    python -m checkpoint_tools.prune_depth --hf DIR --out DIR --keep 0,1,2,5,8

Works on Hugging Face decoders with layer tensors named `model.layers.<i>.…`, and on the decoder of
a known model with parts for images, which becomes a model of its own. The kept layers are
renumbered from 0, and every tensor keeps its bytes, quantised ones too. Config fields that depend
on layer numbers are translated; a field that cannot be translated is an error.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint_tools.common import num_bytes
from checkpoint_tools.prune_checks import (
    LAYER_TENSOR,
    compare_logits,
    complete_lists,
    fields_of_layers,
    renumbered,
)
from megatron_oprd.errors import UserError, run_entry_point
from megatron_oprd.models.families import nested_model, read_architecture
from megatron_oprd.models.open_checkpoint import open_decoder
from megatron_oprd.weights.disk import describe_files
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.hf_writer import (
    DEFAULT_MAX_SHARD_SIZE,
    HFContent,
    convert_to_hf_folder,
)
from megatron_oprd.weights.output_folder import check_output_folder
from megatron_oprd.weights.quantization import FIELD as QUANTIZATION
from megatron_oprd.weights.safetensors_file import TensorSpec

# Config fields that depend on layer numbers, by kind.
# Lists with an entry per layer.
_PER_LAYER = {"layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type"}
_LAYER_NUMBERS = {"mlp_only_layers"}  # a list of layer numbers
# Numbers of layers at the start that differ from the rest.
_FIRST_LAYERS = {"first_k_dense_replace", "num_dense_layers", "max_window_layers"}
# Extra layers after the last one, which predict further tokens. If present, `pruned_names` refuses
# their tensors.
_OTHER_LAYERS = {"num_nextn_predict_layers", "num_mtp_layers"}
_SAME_NUMBER = {"num_hidden_layers", "num_layers", "n_layer", "n_layers"}  # the model's depth
# Every n-th layer differs, unless the field named here lists the layers.
_PERIODS = {
    "decoder_sparse_step": None,
    "moe_layer_freq": None,
    "interleave_moe_layer_step": None,
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "layer_group_size": "layer_types",
    "full_attention_interval": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "attn_layer_period": "layers_block_type",
    "expert_layer_period": None,
}


def evenly_spaced_layers(num_layers: int, keep: int) -> list[int]:
    """Chooses `keep` evenly spaced layers of `num_layers`, including the first and the last.

    Layer i of the result is `round(i * (num_layers - 1) / (keep - 1))`; Python rounds halves to
    even. A single layer is the first. Raises `UserError` unless 1 <= `keep` <= `num_layers`.
    """
    if not 1 <= keep <= num_layers:
        raise UserError(
            f"--num-layers {keep} does not fit, because the model has {num_layers} layers; give "
            f"1..{num_layers}."
        )
    if keep == 1:
        return [0]
    return [round(i * (num_layers - 1) / (keep - 1)) for i in range(keep)]


def prune_depth(
    hf: Path,
    out: Path,
    keep: Sequence[int],
    *,
    force: bool,
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
) -> HFCheckpoint:
    """Writes the model of folder `hf` with only the layers `keep`; returns folder `out` opened.

    `keep` is ascending, and layer keep[i] becomes layer i. The folder appears whole or not at all.

    Raises:
        UserError: `keep` is empty, not ascending or out of range, the layers cannot be picked, the
            pruned model's logits are not those of the kept layers, or a folder cannot be read or
            written.
    """
    source = open_unpruned(hf)
    content = pruned_content(source, keep, max_shard_size)
    check_output_folder(out, force=force, required_bytes=content.num_bytes, source=hf)
    assert not isinstance(content.config, Path)
    print(compare_logits(source, content.config, keep), file=sys.stderr)
    old_names = {new: old for old, new in pruned_names(source, keep).items()}
    convert_to_hf_folder(out, content, lambda name: source.read(old_names[name]), force=force)
    return HFCheckpoint(out)


def open_unpruned(hf: Path) -> HFCheckpoint:
    """Opens the folder to prune; of a known model with further parts its decoder.

    Raises `UserError` if the folder cannot be read, or the decoder's weights are quantised.
    """
    whole = HFCheckpoint(hf)
    if nested_model(whole) is None:
        return whole
    if QUANTIZATION in whole.config:
        raise UserError(
            f"{hf}/config.json has {QUANTIZATION}, which names tensors of the whole model; its "
            "decoder cannot be pruned. Give the model's folder with weights in bf16."
        )
    decoder = open_decoder(whole)
    # The decoder's fields are written where they differ from its class's defaults.
    depth = {"num_hidden_layers": read_architecture(whole).num_layers}
    decoder.replace_config(decoder.config | depth)
    return decoder


def pruned_content(
    source: HFCheckpoint, keep: Sequence[int], max_shard_size: int = DEFAULT_MAX_SHARD_SIZE
) -> HFContent:
    """The content of the pruned model's folder; `UserError` if the source cannot be pruned so."""
    config = pruned_config(source, keep)
    return HFContent(
        tensors={
            new: TensorSpec(shape=source.shape(old), dtype=source.dtype(old))
            for old, new in pruned_names(source, keep).items()
        },
        config=config,
        companion_files=source.companion_files(),
        origin={
            "tool": "prune_depth",
            "source": describe_files(source.files()),
            "layers_kept": list(keep),
        },
        max_shard_size=max_shard_size,
    )


def pruned_names(source: HFCheckpoint, keep: Sequence[int]) -> dict[str, str]:
    """Maps every kept tensor to its name in the pruned model, in the order on disk.

    Raises `UserError` if the layers in the tensors' names are not 0..num_hidden_layers-1.
    """
    names = source.names()
    layers = {int(match[2]) for name in names if (match := LAYER_TENSOR.fullmatch(name))}
    num_layers = _num_layers(source)
    if layers != set(range(num_layers)):
        raise UserError(
            f"{source.folder}: config.json says num_hidden_layers={num_layers}, but tensors named "
            f"model.layers.<i>.… exist for {len(layers)} layers"
            f"{f', up to layer {max(layers)}' if layers else ''}; only models with exactly those "
            "layers can be pruned."
        )
    return renumbered(names, keep)


def pruned_config(source: HFCheckpoint, keep: Sequence[int]) -> dict[str, Any]:
    """The config of the model with only the layers `keep` of `source`.

    Raises `UserError` if `keep` is invalid, or a field depends on layer numbers in a way that
    cannot be kept.
    """
    num_layers = _num_layers(source)
    _check_keep(keep, num_layers)
    config = dict(source.config)
    for field, value in source.config.items():
        if value is None:
            continue
        if field in _PER_LAYER:
            if len(value) != num_layers:
                raise UserError(
                    f"{source.folder}/config.json: {field} has {len(value)} entries for "
                    f"{num_layers} layers; it must have one for each."
                )
            config[field] = [value[layer] for layer in keep]
        elif field in _LAYER_NUMBERS:
            config[field] = [new for new, old in enumerate(keep) if old in value]
        elif field in _FIRST_LAYERS:
            config[field] = sum(layer < value for layer in keep)
        elif field in _PERIODS:
            # A period of 0 or 1 treats all layers alike; a list of the layers overrides the period.
            if value not in (0, 1) and not config.get(_PERIODS[field] or ""):
                raise _cannot_keep(source, field, value)
        # Only the depth itself changes; another number stays.
        elif field in _SAME_NUMBER:
            if value != num_layers:
                raise _cannot_keep(source, field, value)
            config[field] = len(keep)
    known = {*_PER_LAYER, *_LAYER_NUMBERS, *_FIRST_LAYERS, *_PERIODS, *_SAME_NUMBER, *_OTHER_LAYERS}
    for field, value in fields_of_layers(source.config, num_layers, known):
        raise _cannot_keep(source, field, value)
    config["num_hidden_layers"] = len(keep)
    return complete_lists(source, config, keep)


def _cannot_keep(source: HFCheckpoint, field: str, value: object) -> UserError:
    return UserError(
        f"{source.folder}/config.json: {field}={json.dumps(value)} depends on the layers' numbers, "
        "and this tool does not know how to keep its meaning for the remaining layers."
    )


def _check_keep(keep: Sequence[int], num_layers: int) -> None:
    shown = ",".join(map(str, keep))
    if not keep:
        raise UserError("--keep names no layers; give at least one.")
    if outside := [layer for layer in keep if not 0 <= layer < num_layers]:
        raise UserError(
            f"--keep {shown} has layer {outside[0]}, which the model does not have; its layers "
            f"are 0..{num_layers - 1}."
        )
    if list(keep) != sorted(set(keep)):
        raise UserError(
            f"--keep {shown} is not in ascending order, with every layer once; give such a list."
        )


def _num_layers(source: HFCheckpoint) -> int:
    num_layers = source.config.get("num_hidden_layers")
    if not isinstance(num_layers, int):
        raise UserError(
            f"{source.folder}/config.json has no num_hidden_layers at its top level; only plain "
            "decoders (model.layers.<i>.…) can be pruned."
        )
    return num_layers


def _layer_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of layer numbers like 0,2,4"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; `argv` defaults to the process's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_tools.prune_depth",
        description="Make a student of a Hugging Face model by keeping some of its layers.",
    )
    parser.add_argument("--hf", type=Path, required=True, help="the model's folder")
    parser.add_argument("--out", type=Path, required=True, help="the folder to create")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--keep", type=_layer_list, help="the layers to keep, e.g. 0,1,2,5,8")
    choice.add_argument(
        "--num-layers",
        type=int,
        metavar="N",
        help="keep N evenly spaced layers: round(i*(L-1)/(N-1)), halves to the even neighbour",
    )
    parser.add_argument(
        "--max-shard-size",
        type=num_bytes,
        default=DEFAULT_MAX_SHARD_SIZE,
        metavar="SIZE",
        help="most bytes of tensors in a file (default: 5GB)",
    )
    parser.add_argument("--force", action="store_true", help="replace a checkpoint at --out")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written")
    args = parser.parse_args(argv)

    source = open_unpruned(args.hf)
    keep = args.keep
    if keep is None:
        keep = evenly_spaced_layers(_num_layers(source), args.num_layers)
    if args.dry_run:
        content = pruned_content(source, keep, args.max_shard_size)
        check_output_folder(
            args.out, force=args.force, required_bytes=content.num_bytes, source=args.hf
        )
        print(f"layers kept: {','.join(map(str, keep))} of {_num_layers(source)}")
        print(f"would write {args.out}: {len(content.tensors)} tensors, {content.num_bytes} bytes")
        return 0
    pruned = prune_depth(
        args.hf, args.out, keep, force=args.force, max_shard_size=args.max_shard_size
    )
    print(f"{args.out}: {len(pruned.names())} tensors, {pruned.num_bytes()} bytes")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
