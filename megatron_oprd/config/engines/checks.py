"""The checks of the chosen rollout engine's settings that need no model."""

from collections.abc import Callable

from megatron_oprd.config.engines.vllm_checks import check_vllm
from megatron_oprd.config.schema import RunConfig

# Engine -> its check; an engine without settings of its own needs none.
ENGINE_CHECKS: dict[str, Callable[[RunConfig], None]] = {"vllm": check_vllm}
