"""vLLM's base classes of the workers' engines, as far as `host_engines` uses them."""

from typing import Any


class WeightTransferInitInfo:
    """Has no fields."""


class WeightTransferUpdateInfo:
    """Has no fields."""


class WeightTransferEngine:
    """Has a model, which gets the weights."""

    update_info_cls: Any

    def __init__(self, model: Any) -> None:
        self.model = model
        self.model_config = None

    def parse_update_info(self, update_info: dict[str, Any]) -> Any:
        return self.update_info_cls(**update_info)
