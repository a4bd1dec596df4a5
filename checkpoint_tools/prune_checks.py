"""Checks that a config without some layers means the same as before for the remaining layers.

Asks transformers' own configuration and model classes, on the meta device. So this module need not
know what a field means for a layer.
"""

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import NEUTRAL_FIELDS
from megatron_oprd.weights.hf_files import HFCheckpoint
from megatron_oprd.weights.quantization import FIELD as QUANTIZATION
from megatron_oprd.weights.text_part import TextPart

LAYER_TENSOR = re.compile(r"(model\.layers\.)(\d+)(\..+)")
# Lists whose length may equal a small model's number of layers by accident.
_OTHER_LISTS = {
    "architectures", "eos_token_id", "short_factor", "long_factor", "mrope_section", "tags",
    "keys_to_ignore_at_inference",
}  # fmt: skip
# Tokens of the comparison of logits, and its tolerance relative to the largest logit: for dtypes of
# 16 bits and for others.
_TOKENS = 16
_TOLERANCE = (2e-2, 1e-3)
# Names of fields that count or number layers.
_LAYERS_IN_NAME = re.compile(
    r"(^|_)(layer|block)s?_(start|end|index|interval|idx|offset|freq|period|step|group_size|ids)"
    r"|every_n|_interval$|_period$|_pattern$|_layers$|(^|_)layer_idx"
)


def renumbered(names: Iterable[str], keep: Sequence[int]) -> dict[str, str]:
    """The names of all tensors but those of dropped layers, each with its name after pruning."""
    new_number = {old: new for new, old in enumerate(keep)}
    result = {}
    for name in names:
        match = LAYER_TENSOR.fullmatch(name)
        if match is None:
            result[name] = name
        elif (layer := int(match[2])) in new_number:
            result[name] = f"{match[1]}{new_number[layer]}{match[3]}"
    return result


def fields_of_layers(
    config: Mapping[str, Any], num_layers: int, known: set[str]
) -> Iterator[tuple[str, Any]]:
    """Yields (path, value) of fields at any level of a config that seem to describe single layers.

    Skips top-level fields in ``known``, whose meaning for fewer layers is known.
    """
    for field, value in config.items():
        if field not in known:
            yield from _of_layers(field, value, num_layers)


def _of_layers(path: str, value: Any, num_layers: int) -> Iterator[tuple[str, Any]]:
    field = path.rsplit(".", 1)[-1]
    if value in (None, 0, [], {}, "") or field in _OTHER_LISTS or isinstance(value, bool):
        return
    if isinstance(value, dict):
        # A dictionary by layer number; class labels look alike.
        numbered = all(str(key).isdecimal() and int(key) < num_layers for key in value)
        if numbered and field not in ("id2label", "label2id"):
            yield path, value
            return
        for key, one in value.items():
            yield from _of_layers(f"{path}.{key}", one, num_layers)
    elif isinstance(value, list):
        if len(value) == num_layers > 1 or "layer" in field or _LAYERS_IN_NAME.search(field):
            yield path, value
        else:
            for number, one in enumerate(value):
                if isinstance(one, dict | list | str):
                    yield from _of_layers(f"{path}.{number}", one, num_layers)
    elif isinstance(value, str):
        # One letter per layer, or a text that lists layers.
        is_pattern = len(value) == num_layers > 4 and len(set(value)) <= 4 and not value.isdigit()
        is_pattern = is_pattern and field not in NEUTRAL_FIELDS
        if is_pattern or re.search(r"pattern|enum", field) or re.search(r"layers\.\d", value):
            yield path, value
    elif isinstance(value, int) and _LAYERS_IN_NAME.search(field):
        yield path, value


def complete_lists(
    source: HFCheckpoint, config: dict[str, Any], keep: Sequence[int]
) -> dict[str, Any]:
    """Adds the per-layer lists that transformers would derive from layer numbers to a config.

    If config.json lacks a list such as ``layer_types``, the class derives it from each layer's
    number, with another result for fewer layers. So the list of the kept layers is written out.

    Raises `UserError` if transformers would still build the kept layers differently.
    """
    classes = _read(source, source.config), _read(source, config)
    if None in classes:
        return config
    of_source, of_pruned = (_lists(one, one.num_hidden_layers) for one in classes if one)
    picked = {path: [values[layer] for layer in keep] for path, values in of_source.items()}
    completed = dict(config)
    for path, values in picked.items():
        # Nested fields cannot be set from the top level; the check below catches them.
        if of_pruned.get(path) != values and "." not in path:
            completed[path] = values
    again = _read(source, completed)
    assert again is not None
    # With a single layer, any list of one entry would count as one entry per layer.
    found = _lists(again, len(keep)) if len(keep) > 1 else picked
    if wrong := [path for path, values in picked.items() if found.get(path) != values]:
        raise UserError(
            f"{source.folder}/config.json: transformers derives {wrong[0]} from the layers' "
            f"numbers; for layers {list(keep)} it would be {found.get(wrong[0])}, not "
            f"{picked[wrong[0]]}, and that cannot be written down. Keep other layers."
        )
    _check_shapes(source, classes[0], again, keep)
    return completed


def compare_logits(source: HFCheckpoint, config: Mapping[str, Any], keep: Sequence[int]) -> str:
    """Compares a pruned model with the whole one, whose other layers pass their input on.

    Both run in transformers on the same weights, so only the config's meaning for the layers can
    make a difference. Returns a line for the user: the result, or why nothing was compared.

    Raises `UserError` if the logits differ.
    """
    whole_config, pruned_config = _read(source, source.config), _read(source, config)
    if whole_config is None or pruned_config is None:
        return f"logits were not compared: transformers has no {source.config.get('model_type')}"
    if QUANTIZATION in source.config:
        return "logits were not compared: the weights are quantised"
    # Both models exist until assign replaces the pruned one's own weights, and both are in one
    # dtype, whatever the tensors' own are.
    dtype = source.dtype(source.names()[0])
    elements = sum(math.prod(source.shape(name)) for name in source.names())
    needed, free = 2 * elements * dtype.itemsize, psutil.virtual_memory().available
    if needed > free:
        return (
            f"logits were not compared: both models take {needed / 1e9:.1f} GB of host memory, and "
            f"{free / 1e9:.1f} GB are free"
        )
    try:
        kind = AutoModelForImageTextToText if isinstance(source, TextPart) else AutoModelForCausalLM
        whole = kind.from_pretrained(source.folder, dtype=dtype, attn_implementation="eager").eval()
        pruned = AutoModelForCausalLM.from_config(
            pruned_config, dtype=dtype, attn_implementation="eager"
        ).eval()
    except (ValueError, ImportError, RuntimeError) as error:
        text = " ".join(str(error).split())[:200]
        return f"logits were not compared: transformers cannot load the model: {text}"
    state = _decoder_state(whole)
    # assign shares the tensors instead of copying them.
    pruned.load_state_dict(
        {new: state[old] for old, new in renumbered(state, keep).items()}, assign=True
    )
    for number, layer in enumerate(whole.get_decoder().layers):
        if number not in keep:
            layer.register_forward_hook(_pass_input_on, with_kwargs=True)
    # 7919, a prime, spreads the tokens over the vocabulary, the same ones in every run.
    tokens = torch.arange(_TOKENS)[None] * 7919 % whole_config.get_text_config().vocab_size
    with torch.no_grad():
        expected = whole(tokens, use_cache=False).logits.float()
        found = pruned(tokens, use_cache=False).logits.float()
    largest = float(expected.abs().max())
    difference = float((found - expected).abs().max())
    if not difference <= _TOLERANCE[dtype.itemsize > 2] * largest:
        raise UserError(
            f"{source.folder}: logits of the model of layers {list(keep)} are off by "
            f"{difference:.3g} (the largest is {largest:.3g}) from those of the whole model "
            "without its other layers. The config has a field that depends on the layers' numbers."
        )
    return (
        f"logits of {_TOKENS} tokens are those of the whole model without its other layers: "
        f"largest difference {difference:.2g} of {largest:.3g}"
    )


def _decoder_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A model's tensors under the names of its decoder alone."""
    decoder = model.get_decoder()
    place = next(name for name, module in model.named_modules() if module is decoder)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(f"{place}."):
            state[f"model.{name.removeprefix(place + '.')}"] = tensor
        elif not name.startswith("model."):  # the head
            state[name] = tensor
    return state


def _pass_input_on(
    layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _read(source: HFCheckpoint, config: Mapping[str, Any]) -> PreTrainedConfig | None:
    """The config as completed by transformers; None for a model that it does not know."""
    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        # Deep, because from_dict modifies nested dictionaries.
        return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"{source.folder}/config.json: transformers refuses the configuration with "
            f"num_hidden_layers = {config.get('num_hidden_layers')}: {text}"
        ) from error


def _lists(config: PreTrainedConfig, num_layers: int) -> dict[str, list[Any]]:
    """All lists with one entry per layer, by path."""
    found: dict[str, list[Any]] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, list | tuple):
            if len(value) == num_layers and path.rsplit(".", 1)[-1] not in _OTHER_LISTS:
                found[path] = list(value)
        elif isinstance(value, dict):
            for key, one in value.items():
                walk(one, f"{path}.{key}" if path else str(key))

    walk(config.to_dict(), "")
    return found


def _check_shapes(
    source: HFCheckpoint, whole: Any, pruned: PreTrainedConfig, keep: Sequence[int]
) -> None:
    """Checks the pruned model's names and shapes against the whole one's kept layers."""
    of_whole, of_pruned = _shapes(whole), _shapes(pruned)
    if of_whole is None or of_pruned is None:
        return
    expected = {new: of_whole[old] for old, new in renumbered(of_whole, keep).items()}
    if different := sorted(set(expected.items()) ^ set(of_pruned.items())):
        name = different[0][0]
        raise UserError(
            f"{source.folder}: the model of layers {list(keep)} is another one than these layers: "
            f"transformers builds {name} as {of_pruned.get(name)}, the layer has "
            f"{expected.get(name)}. The config has a field that depends on the layers' numbers."
        )


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]] | None:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError:  # no causal language model
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
