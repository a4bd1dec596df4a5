"""The rollout engines as settings know them: names, groups of settings, and what these exclude.

`megatron_oprd.rollout.registry` has the engines themselves, under the same names.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.config.setting import group, setting, when

EngineName = Literal["hf", "vllm"]


@dataclass(kw_only=True)
class EngineConfig:
    """The engine that generates, and a group of settings for each engine that has any."""

    engine: EngineName = setting("hf")
    """``hf`` generates with transformers on the first rank of each data-parallel replica. ``vllm``
    generates with vLLM in other processes, on all devices of the run or on servers."""

    vllm: VLLMConfig = group(VLLMConfig, only_with=when("rollout.engine", "vllm"))
