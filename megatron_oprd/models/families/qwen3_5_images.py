"""Qwen3.5 and Qwen3.6, dense: a decoder beside parts for images and videos.

The parts for images, and layers that predict further tokens, are not read; an export is the decoder
alone.
"""

from megatron_oprd.models.families import qwen3_5
from megatron_oprd.models.families.decoder import Check, anything
from megatron_oprd.models.families.nested import Nested

# Of tokens that stand for images and videos.
FIELDS: dict[str, Check] = {
    "image_token_id": anything,
    "video_token_id": anything,
    "vision_config": anything,
    "vision_end_token_id": anything,
    "vision_start_token_id": anything,
}

NESTED = Nested(
    name="Qwen3_5ForConditionalGeneration",
    model_type="qwen3_5",
    decoders={qwen3_5.FAMILY.model_type: qwen3_5.FAMILY.name},
    decoder_prefix="model.language_model.",
    plain_prefix="model.",
    other_prefixes=("model.visual.", "mtp."),
    fields=FIELDS,
)
