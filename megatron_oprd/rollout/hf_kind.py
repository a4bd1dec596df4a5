"""The rollout engine ``hf``: its creation and its memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_oprd.config.schema import RolloutConfig
from megatron_oprd.rollout.costs import EngineBytes, EngineLoad, MemoryChanges, SettingChange
from megatron_oprd.rollout.kind import EngineKind

if TYPE_CHECKING:
    import torch

    from megatron_oprd.parallel.context import ParallelContext
    from megatron_oprd.rollout.engine import RolloutEngine
    from megatron_oprd.rollout.recovery import EngineStarter
    from megatron_oprd.rollout.served_model import ServedModel

_FP32, _INT64 = 4, 8


class HFKind(EngineKind):
    """transformers in the trainer's process (`HFEngine`)."""

    name = "hf"
    title = "transformers"
    switches_rotary_factors = True

    @contextmanager
    def open(
        self,
        rollout: RolloutConfig,
        model: ServedModel,
        context: ParallelContext,
        *,
        log_prefix: str,
    ) -> Iterator[EngineStarter]:
        """The first rank of each data-parallel replica has an engine."""
        from megatron_oprd.rollout.gpus import leaders
        from megatron_oprd.rollout.recovery import EngineStarter

        yield EngineStarter(
            owners=leaders(context),
            create=lambda: self.create(rollout, model, device=context.device),
        )

    def alone(
        self,
        *,
        max_batch_size: int,
        device: torch.device,
        num_gpus: int = 1,
        server_url: str | None = None,
    ) -> RolloutConfig:
        """Its only setting."""
        assert num_gpus == 1
        assert server_url is None
        return RolloutConfig(engine="hf", max_batch_size=max_batch_size)

    def create(
        self,
        rollout: RolloutConfig,
        model: ServedModel,
        *,
        device: torch.device,
        gpus: Sequence[str] = (),
    ) -> RolloutEngine:
        """Builds the model on ``device``."""
        from megatron_oprd.rollout.hf import HFEngine

        return HFEngine(
            model.folder,
            dtype=model.dtype,
            device=device,
            eos_token_ids=model.eos_token_ids(),
            pad_token_id=model.pad_token_id(),
            known_ids=model.known_ids(),
            decode=model.decode,
            max_batch_size=rollout.max_batch_size,
        )

    def memory(self, rollout: RolloutConfig, load: EngineLoad) -> EngineBytes:
        """A copy of the whole student, kept between rollouts, and what one generation needs.

        The workspace is the largest of prefill, a layer's attention and sampling.
        """
        batch, itemsize = load.num_at_once(rollout.max_batch_size), load.itemsize
        per_head = 2 * batch * load.length * load.head_dim * itemsize  # keys and values
        layer = load.num_query_groups * per_head
        # With padded prompts, transformers repeats keys and values for every query head.
        repeated = load.num_attention_heads * per_head
        of_token = 3 * (load.ffn_hidden_size + load.hidden_size) * itemsize
        prefill = batch * load.prompt_tokens * of_token
        # Logits in the weights' type and, with and without noise, in fp32; the noise's bits, and
        # noise in fp32.
        sampling = batch * load.vocab_size * (itemsize + 3 * _FP32 + _INT64)
        # One layer more: appending a token copies a layer's cache.
        kv_cache = (load.num_layers + 1) * layer
        return EngineBytes(
            num_gpus=1,
            weights=load.num_weights * itemsize,
            kv_cache=kv_cache,
            workspace=max(prefill, sampling, repeated),
            sleeps=False,
            # The cache grows with the responses.
            num_tokens=batch * load.length,
            max_model_len=load.length,
            num_responses=batch,
            read_cache=kv_cache,
        )

    def seconds_of_token(
        self, rollout: RolloutConfig, *, num_layers: int, working: float, message_bytes: int
    ) -> float:
        """Launches from Python, beside which the GPU works.

        23 ms for 24 layers on an H100, measured with transformers 5.
        """
        return max(working, 0.023 / 24 * num_layers)

    def alternatives(
        self, rollout: RolloutConfig, *, gpus_per_node: int
    ) -> list[tuple[SettingChange, ...]]:
        """The batch as it is, and smaller ones."""
        return [(), *((change,) for change in _smaller_batches(rollout))]

    def memory_changes(self, rollout: RolloutConfig) -> MemoryChanges:
        """Smaller batches."""
        return MemoryChanges(costly=[_smaller_batches(rollout)])


def _smaller_batches(rollout: RolloutConfig) -> list[SettingChange]:
    size = rollout.max_batch_size or rollout.prompts_per_step * rollout.samples_per_prompt
    return [("rollout.max_batch_size", size >> by) for by in range(1, size.bit_length())]
