"""What the rest of the package asks of a rollout engine, by which no engine has to be named."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_oprd.config.schema import RolloutConfig
from megatron_oprd.rollout.costs import EngineBytes, EngineLoad, MemoryChanges, SettingChange

if TYPE_CHECKING:
    # These import transformers and Megatron, which looking an engine up does not need.
    import torch

    from megatron_oprd.parallel.context import ParallelContext
    from megatron_oprd.parallel.node import Node
    from megatron_oprd.rollout.engine import RolloutEngine
    from megatron_oprd.rollout.recovery import EngineStarter
    from megatron_oprd.rollout.served_model import ServedModel

# In the trainer's process, in a process of its own on the trainer's devices, or elsewhere.
Place = Literal["trainer", "device", "server"]


class EngineKind(ABC):
    """A rollout engine that ``rollout.engine`` can select.

    What is not abstract has the answer of an engine without settings in the trainer's process. A
    kind is looked up without importing its engine: methods import what they need.

    Attributes:
        name: The value of ``rollout.engine``.
        title: The engine's name in messages.
        extras: Extras of this package that install the engine, GPUs first.
        max_temperature: Highest temperature; None: no bound.
        may_change: Prefixes of the engine's settings that a resumed run may change.
        has_processes: Whether it can run in processes of its own on the trainer's devices.
        splits_models: Whether an engine can have several GPUs.
        has_servers: Whether it can generate on a server.
        switches_rotary_factors: Whether a sequence that grows past longrope's original length gets
            other factors on the way, unlike in training.
        overlaps: Whether it can generate while the trainer computes (`OverlappingEngine`).
        trials: Settings with which a self-test tries the engine on a GPU, by name.
        host_memory_setting: Setting with which the engine moves weights to the host's memory.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    extras: ClassVar[tuple[str, ...]] = ()
    max_temperature: ClassVar[float | None] = None
    may_change: ClassVar[tuple[str, ...]] = ()
    has_processes: ClassVar[bool] = False
    splits_models: ClassVar[bool] = False
    has_servers: ClassVar[bool] = False
    switches_rotary_factors: ClassVar[bool] = False
    overlaps: ClassVar[bool] = False
    trials: ClassVar[Mapping[str, Sequence[str]]] = {}
    host_memory_setting: ClassVar[str] = ""

    def setting(self, name: str) -> str:
        """The full name of one of the engine's own settings."""
        return f"rollout.{self.name}.{name}"

    def place(self, rollout: RolloutConfig) -> Place:
        """Where it generates."""
        return "trainer"

    def num_gpus(self, rollout: RolloutConfig) -> int:
        """GPUs that divide an engine's layers (the setting ``tensor_model_parallel_size``)."""
        return 1

    def swaps_weights(self, rollout: RolloutConfig) -> bool:
        """Whether new weights can reach responses that are under way."""
        return False

    def max_model_len(self, rollout: RolloutConfig) -> int | None:
        """The setting ``max_model_len``; None: as long as the run needs."""
        return None

    def check_installed(self, rollout: RolloutConfig) -> None:
        """Raises UserError if a package is missing here; imports none."""
        return

    def check_server(self, rollout: RolloutConfig, model: ServedModel) -> None:
        """Raises UserError if a server that is there already cannot serve the model."""
        return

    def check_host(self, rollout: RolloutConfig, node: Node) -> None:
        """Raises UserError if engines, or servers, cannot be started on this node."""
        return

    @abstractmethod
    def open(
        self,
        rollout: RolloutConfig,
        model: ServedModel,
        context: ParallelContext,
        *,
        log_prefix: str,
    ) -> AbstractContextManager[EngineStarter]:
        """Makes ready for engines; collective over all ranks.

        Args:
            rollout: The run's settings.
            model: The student.
            context: This rank's place.
            log_prefix: Start of the path of a file with the engine's output, if it has one.
        """

    @abstractmethod
    def alone(
        self,
        *,
        max_batch_size: int,
        device: torch.device,
        num_gpus: int = 1,
        server_url: str | None = None,
    ) -> RolloutConfig:
        """Settings of an engine without a trainer, which has its devices for itself."""

    @abstractmethod
    def create(
        self,
        rollout: RolloutConfig,
        model: ServedModel,
        *,
        device: torch.device,
        gpus: Sequence[str] = (),
    ) -> RolloutEngine:
        """Creates an engine without weights.

        ``gpus`` are the names of its GPUs for CUDA_VISIBLE_DEVICES, ``device`` first; empty on a
        CPU.
        """

    @abstractmethod
    def memory(self, rollout: RolloutConfig, load: EngineLoad) -> EngineBytes | None:
        """Estimates an engine's memory on the trainer's GPUs; None if it has its own."""

    def check_memory(self, rollout: RolloutConfig, engine: EngineBytes, memory_gb: float) -> None:
        """Raises UserError if the longest sequence does not fit, on a GPU with ``memory_gb``."""
        return

    def seconds_of_token(
        self, rollout: RolloutConfig, *, num_layers: int, working: float, message_bytes: int
    ) -> float:
        """The time between two tokens of a response.

        ``working`` is what the GPU needs for it at least, by its memory's bandwidth or its
        arithmetic; both in seconds. ``message_bytes`` are the hidden states of a token of every
        response that is generated at once.
        """
        return working

    def alternatives(
        self, rollout: RolloutConfig, *, gpus_per_node: int
    ) -> list[tuple[SettingChange, ...]]:
        """Settings of the engine to choose from when a layout is recommended."""
        return [()]

    def memory_changes(self, rollout: RolloutConfig) -> MemoryChanges:
        """Changes of settings with which the engine needs less memory, to try in turn."""
        return MemoryChanges()
