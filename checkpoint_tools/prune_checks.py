"""Whether a config that lost layers still says of each kept layer what it said before.

transformers' own configuration and model classes are asked, on the meta device: what a field means
for a layer need not be known here.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import NEUTRAL_FIELDS
from megatron_oprd.weights.hf_files import HFCheckpoint

LAYER_TENSOR = re.compile(r"(model\.layers\.)(\d+)(\..+)")
# Lists and texts that have as many entries as a small model has layers, by accident.
_OTHER_LISTS = {
    "architectures", "eos_token_id", "short_factor", "long_factor", "mrope_section", "tags",
    "keys_to_ignore_at_inference",
}  # fmt: skip
# Tokens that logits are compared on, and what they may differ by, relative to the largest: of
# dtypes with 16 bits, and of others.
_TOKENS = 16
_TOLERANCE = (2e-2, 1e-3)
_LAYERS_IN_NAME = re.compile(
    r"(^|_)(layer|block)s?_(start|end|index|interval|idx|offset|freq|period|step|group_size|ids)"
    r"|every_n|_interval$|_period$|_pattern$|_layers$|(^|_)layer_idx"
)


def fields_of_layers(
    config: Mapping[str, Any], num_layers: int, known: set[str]
) -> Iterator[tuple[str, Any]]:
    """Fields that seem to say something layer by layer, of all levels of a config.

    Args:
        config: The content of config.json.
        num_layers: The model's layers.
        known: Fields of the top level whose meaning for fewer layers is known.

    Yields:
        The field's path and its value.
    """
    for field, value in config.items():
        if field not in known:
            yield from _of_layers(field, value, num_layers)


def _of_layers(path: str, value: Any, num_layers: int) -> Iterator[tuple[str, Any]]:
    field = path.rsplit(".", 1)[-1]
    if value in (None, 0, [], {}, "") or field in _OTHER_LISTS or isinstance(value, bool):
        return
    if isinstance(value, dict):
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
        # One letter a layer, or a text that lists layers.
        is_pattern = len(value) == num_layers > 4 and len(set(value)) <= 4 and not value.isdigit()
        is_pattern = is_pattern and field not in NEUTRAL_FIELDS
        if is_pattern or re.search(r"pattern|enum", field) or re.search(r"layers\.\d", value):
            yield path, value
    elif isinstance(value, int) and _LAYERS_IN_NAME.search(field):
        yield path, value


def complete_lists(
    source: HFCheckpoint, config: dict[str, Any], keep: Sequence[int]
) -> dict[str, Any]:
    """The pruned config, with the lists that transformers would derive from layers' numbers.

    A list that config.json leaves out, such as ``layer_types``, is derived by the class from each
    layer's number; of fewer layers it comes out as another one. So it is written down.

    Args:
        source: The model.
        config: Its config for the layers that are kept.
        keep: These layers.

    Raises:
        UserError: transformers would take kept layers for other ones.
    """
    classes = _read(source, source.config), _read(source, config)
    if None in classes:
        return config
    of_source, of_pruned = (_lists(one, one.num_hidden_layers) for one in classes if one)
    picked = {path: [values[layer] for layer in keep] for path, values in of_source.items()}
    completed = dict(config)
    for path, values in picked.items():
        if of_pruned.get(path) != values and "." not in path:
            completed[path] = values
    again = _read(source, completed)
    assert again is not None
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
    """Compares the pruned model with the whole one whose other layers pass their input on.

    Both run in transformers on the same weights, so that only what a config says of its layers can
    make a difference.

    Args:
        source: The model.
        config: The pruned model's config.
        keep: The layers that are kept.

    Returns:
        What was compared, or why nothing was, as a line for the user.

    Raises:
        UserError: The logits differ.
    """
    whole_config, pruned_config = _read(source, source.config), _read(source, config)
    if whole_config is None or pruned_config is None:
        return f"logits were not compared: transformers has no {source.config.get('model_type')}"
    needed, free = 2 * source.num_bytes(), psutil.virtual_memory().available
    if needed > free:
        return (
            f"logits were not compared: both models take {needed / 1e9:.1f} GB of host memory, and "
            f"{free / 1e9:.1f} GB are free"
        )
    dtype = source.dtype(source.names()[0])
    try:
        whole = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=dtype, attn_implementation="eager"
        ).eval()
        pruned = AutoModelForCausalLM.from_config(
            pruned_config, dtype=dtype, attn_implementation="eager"
        ).eval()
    except (ValueError, ImportError, RuntimeError) as error:
        text = " ".join(str(error).split())[:200]
        return f"logits were not compared: transformers cannot load the model: {text}"
    new_number = {old: new for new, old in enumerate(keep)}
    state = {}
    for name, tensor in whole.state_dict().items():
        match = LAYER_TENSOR.fullmatch(name)
        if match is None:
            state[name] = tensor
        elif int(match[2]) in new_number:
            state[f"{match[1]}{new_number[int(match[2])]}{match[3]}"] = tensor
    pruned.load_state_dict(state, assign=True)
    for number, layer in enumerate(whole.get_decoder().layers):
        if number not in new_number:
            layer.register_forward_hook(_pass_input_on, with_kwargs=True)
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


def _pass_input_on(
    layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _read(source: HFCheckpoint, config: Mapping[str, Any]) -> PreTrainedConfig | None:
    """The config as transformers completes it; None for a model that it does not know."""
    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"{source.folder}/config.json: transformers refuses the configuration with "
            f"num_hidden_layers = {config.get('num_hidden_layers')}: {text}"
        ) from error


def _lists(config: PreTrainedConfig, num_layers: int) -> dict[str, list[Any]]:
    """Every list of one entry a layer, by its path."""
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
    """Checks names and shapes of the pruned model against the kept layers of the whole one."""
    of_whole, of_pruned = _shapes(whole), _shapes(pruned)
    if of_whole is None or of_pruned is None:
        return
    new_number = {old: new for new, old in enumerate(keep)}
    expected = {}
    for name, shape in of_whole.items():
        match = LAYER_TENSOR.fullmatch(name)
        if match is None:
            expected[name] = shape
        elif int(match[2]) in new_number:
            expected[f"{match[1]}{new_number[int(match[2])]}{match[3]}"] = shape
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
