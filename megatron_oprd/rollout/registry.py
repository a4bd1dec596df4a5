"""The rollout engines by name."""

from megatron_oprd.config.schema import RolloutConfig
from megatron_oprd.rollout.hf_kind import HFKind
from megatron_oprd.rollout.kind import EngineKind
from megatron_oprd.rollout.vllm.kind import VLLMKind

# Their settings are registered in `megatron_oprd.config.engines`.
ENGINES: dict[str, EngineKind] = {kind.name: kind for kind in (HFKind(), VLLMKind())}


def engine_kind(rollout: RolloutConfig) -> EngineKind:
    """The engine that the settings select."""
    return ENGINES[rollout.engine]
