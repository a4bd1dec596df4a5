"""The beginning and the end of vLLM's reload, which need nothing here."""

from typing import Any


def initialize_layerwise_reload(model: Any) -> None:
    pass


def finalize_layerwise_reload(model: Any, model_config: Any) -> None:
    pass
