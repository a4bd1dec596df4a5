"""Models with parts beside a decoder: which tensors and fields are the decoder's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import check_fields
from megatron_oprd.models.families.decoder import Check, anything


@dataclass(frozen=True, kw_only=True)
class Nested:
    """A model whose decoder, described in ``text_config``, is of a supported family."""

    name: str  # the Hugging Face class
    model_type: str  # in config.json
    decoders: Mapping[str, str]  # text_config's model_type -> the decoder's class, alone
    decoder_prefix: str  # in front of the names of the decoder's tensors
    plain_prefix: str = ""  # in its place in the decoder alone
    other_prefixes: tuple[str, ...]  # beginnings of the names of all other tensors
    tied_by_default: bool = False  # of the decoder's class, where nothing is written
    # Fields beside text_config. Those of parts that are not read have no effect on text.
    fields: Mapping[str, Check]

    def check(self, raw: dict[str, Any], source: str) -> None:
        """Refuses fields outside of ``text_config`` that may change the decoder's numbers.

        Raises:
            UserError: A field is unknown, or the two of tied embeddings contradict each other.
        """
        if raw.get("model_type") != self.model_type:
            raise UserError(
                f"{source}: model_type = {raw.get('model_type')!r} does not fit {self.name}, "
                f"whose model_type is {self.model_type!r}"
            )
        text = raw.get("text_config")
        if not isinstance(text, dict):
            raise UserError(
                f"{source}: text_config = {text!r} has to be an object with the decoder's fields"
            )
        check_fields(raw, required={**self.fields, "text_config": anything}, source=source)
        tied, of_text = (one.get("tie_word_embeddings") for one in (raw, text))
        found = self.tied_by_default if of_text is None else bool(of_text)
        if tied is not None and tied != found:
            missing = f"missing, which is {str(self.tied_by_default).lower()}"
            raise UserError(
                f"{source}: tie_word_embeddings = {tied}, but text_config's is "
                f"{missing if of_text is None else of_text}; give both the value "
                "that fits the weights (false where they have an lm_head)"
            )

    def decoder_of(self, model_type: str, source: str) -> str:
        """The decoder's class; `UserError` if its ``model_type`` is not supported."""
        if model_type not in self.decoders:
            raise UserError(
                f"{source}: text_config has model_type = {model_type!r}; supported are "
                f"{', '.join(self.decoders)}"
            )
        return self.decoders[model_type]
