"""Reads which tensors of a published checkpoint are quantised, and with which scales.

Three forms are read. Two have weights in FP8 (e4m3) beside scales in floating point: transformers'
`fp8`, with ``weight_scale_inv`` for each block, and compressed-tensors' `float-quantized`, with
``weight_scale`` for each tensor, row or block. The third is GPT-OSS's `mxfp4`, with 4 bits and a
power of two for each group of 32. A weight is its code times its scale. Activations are not
quantised here, whatever the configuration says of them.
"""

from dataclasses import dataclass
from typing import Any

from megatron_oprd.errors import UserError

FIELD = "quantization_config"
# Where `dequantize` of the methods would be wanted, there is a folder without them.
_INSTEAD = {
    "awq": "the model's bf16 folder, or its FP8 one",
    "gptq": "the model's bf16 folder, or its FP8 one",
    "bitsandbytes": "the folder that was quantised",
}
# Fields that only engines with quantised activations read, or notes of the tool that wrote them.
_FP8_UNREAD = {
    "activation_scheme", "modules_to_not_convert", "ignored_layers", "dequantize",
}  # fmt: skip
_COMPRESSED_UNREAD = {
    "ignore", "quantization_status", "version", "global_compression_ratio",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How weights are stored."""

    scale_suffix: str  # of the name of a weight's scales, behind the weight's own
    # Rows and columns of a matrix with one scale; None: as the scales' shape says, which is one
    # scale, or one a row.
    block: tuple[int, int] | None
    is_mxfp4: bool = False  # of 4 bits; otherwise FP8


def read_quantization(config: dict[str, Any], source: str) -> Quantization | None:
    """Reads config.json's ``quantization_config``; None without one.

    ``source`` is the file, for messages. Raises `UserError` for another form.
    """
    found = config.get(FIELD)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method == "fp8":
        return _fp8(found, source)
    if method == "compressed-tensors":
        return _compressed(found, source)
    if method == "mxfp4":
        return _mxfp4(found, source)
    raise UserError(
        f"{source} has {FIELD} with quant_method = {method!r}, which is not supported; give "
        f"{_INSTEAD.get(str(method), 'the folder of the model that was quantised')}. Supported are "
        "fp8, compressed-tensors with FP8 weights, and mxfp4"
    )


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the dequantised model."""
    return {name: value for name, value in config.items() if name != FIELD}


def _fp8(found: dict[str, Any], source: str) -> Quantization:
    accepted: dict[str, tuple[Any, ...]] = {
        "fmt": ("e4m3", "float8_e4m3fn"),
        "scale_fmt": ("float",),
        "expert_dtype": ("fp8",),
    }
    block = found.get("weight_block_size")
    for name, value in found.items():
        if name in ("quant_method", "weight_block_size") or name in _FP8_UNREAD or value is None:
            continue
        _check(value, accepted.get(name), name, source)
    return Quantization(scale_suffix="_scale_inv", block=_block(block, "weight_block_size", source))


def _mxfp4(found: dict[str, Any], source: str) -> Quantization:
    for name, value in found.items():
        if name not in ("quant_method", "modules_to_not_convert", "dequantize") and value:
            _check(value, None, name, source)
    return Quantization(scale_suffix="_scales", block=None, is_mxfp4=True)


def _compressed(found: dict[str, Any], source: str) -> Quantization:
    for name, value in found.items():
        if name in ("quant_method", "config_groups") or name in _COMPRESSED_UNREAD or not value:
            continue
        _check(value, {"format": ("float-quantized",)}.get(name), name, source)
    blocks = set()
    for group in (found.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        for name, wanted in (
            ("num_bits", (8,)),
            ("type", ("float",)),
            ("symmetric", (True,)),
            ("dynamic", (False,)),
            ("strategy", ("tensor", "channel", "block")),
        ):
            _check(weights.get(name), wanted, f"config_groups' weights.{name}", source)
        size = weights.get("block_structure") if weights["strategy"] == "block" else None
        if weights["strategy"] == "block" and size is None:
            raise UserError(f"{source}: {FIELD} has blocks without a block_structure")
        blocks.add(_block(size, "block_structure", source))
    if len(blocks) != 1:
        raise UserError(
            f"{source}: {FIELD} has {len(blocks)} sizes of blocks in its config_groups; one is "
            "supported"
        )
    return Quantization(scale_suffix="_scale", block=blocks.pop())


def _block(found: Any, name: str, source: str) -> tuple[int, int] | None:
    if found is None:
        return None
    if (
        not isinstance(found, list)
        or len(found) != 2
        or not all(isinstance(size, int) and size > 0 for size in found)
    ):
        raise UserError(f"{source}: {FIELD}.{name} = {found!r} has to be two sizes, [128, 128]")
    return found[0], found[1]


def _check(value: Any, accepted: tuple[Any, ...] | None, name: str, source: str) -> None:
    if accepted is None or value not in accepted:
        right = "not known" if accepted is None else f"not one of {list(accepted)}"
        raise UserError(
            f"{source}: {FIELD} has {name} = {value!r}, which is {right}; it may change the "
            "weights, so the model is refused"
        )
