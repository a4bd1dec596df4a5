"""vLLM's factory of the workers' engines."""

import importlib
from typing import Any, ClassVar


class WeightTransferEngineFactory:
    """Has the engines that were registered, and vLLM's own none."""

    _engines: ClassVar[dict[str, tuple[str, str]]] = {}

    @classmethod
    def register_engine(cls, name: str, module: str, class_name: str) -> None:
        assert name not in cls._engines
        cls._engines[name] = module, class_name

    @classmethod
    def create_engine(cls, name: str, model: Any) -> Any:
        module, class_name = cls._engines[name]
        return getattr(importlib.import_module(module), class_name)(model)
