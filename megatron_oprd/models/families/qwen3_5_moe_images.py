"""Qwen3.5 and Qwen3.6 with experts: a decoder beside parts for images and videos.

The parts for images, and layers that predict further tokens, are not read; an export is the decoder
alone.
"""

from megatron_oprd.models.families import qwen3_5_images, qwen3_5_moe
from megatron_oprd.models.families.nested import Nested

NESTED = Nested(
    name="Qwen3_5MoeForConditionalGeneration",
    model_type="qwen3_5_moe",
    decoders={qwen3_5_moe.FAMILY.model_type: qwen3_5_moe.FAMILY.name},
    decoder_prefix="model.language_model.",
    plain_prefix="model.",
    other_prefixes=("model.visual.", "mtp."),
    fields=qwen3_5_images.FIELDS,
)
