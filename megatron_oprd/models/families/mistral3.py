"""Mistral Small 3.1 and later, Ministral 3, Devstral Small 2: a decoder beside parts for images.

The decoder is a Mistral or a Ministral 3. The parts for images are not read, and an export is the
decoder alone.
"""

from megatron_oprd.models.families import ministral3, mistral
from megatron_oprd.models.families.decoder import anything
from megatron_oprd.models.families.nested import Nested

NESTED = Nested(
    name="Mistral3ForConditionalGeneration",
    model_type="mistral3",
    decoders={one.FAMILY.model_type: one.FAMILY.name for one in (mistral, ministral3)},
    decoder_prefix="language_model.",
    other_prefixes=("vision_tower.", "multi_modal_projector."),
    fields={
        "image_token_id": anything,
        "image_token_index": anything,
        "multimodal_projector_bias": anything,
        "projector_hidden_act": anything,
        "spatial_merge_size": anything,
        "vision_config": anything,
        "vision_feature_layer": anything,
    },
)
