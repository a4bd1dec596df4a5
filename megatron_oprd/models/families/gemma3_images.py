"""Gemma 3 (4B, 12B and 27B): a decoder beside parts for images.

The parts for images are not read, and an export is the decoder alone.
"""

from megatron_oprd.models.families import gemma3
from megatron_oprd.models.families.decoder import anything
from megatron_oprd.models.families.nested import Nested

NESTED = Nested(
    name="Gemma3ForConditionalGeneration",
    model_type="gemma3",
    decoders={gemma3.FAMILY.model_type: gemma3.FAMILY.name},
    decoder_prefix="language_model.",
    other_prefixes=("vision_tower.", "multi_modal_projector."),
    tied_by_default=True,
    fields={
        "boi_token_index": anything,
        "eoi_token_index": anything,
        "image_token_index": anything,
        "mm_tokens_per_image": anything,
        "vision_config": anything,
    },
)
