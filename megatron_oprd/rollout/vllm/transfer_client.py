"""The calls of vLLM's weight transfer, as engines and servers take them."""

from typing import Any, Protocol


class Client(Protocol):
    """Calls an engine's methods of these names; vLLM's protocol VLLMWeightSyncClient.

    It is written here again because a trainer on a CPU need not have vLLM. All raise
    RolloutEngineError.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects the workers with the trainer."""

    def start_weight_update(self) -> None:
        """Prepares the workers' modules for new weights."""

    def update_weights(self, update_info: Any) -> None:
        """Has the workers take a chunk; returns when they have."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Ends the update; the weights are those of this version."""
