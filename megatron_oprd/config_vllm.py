"""The settings of the vLLM rollout engine, the group ``rollout.vllm`` of a run's configuration."""

from dataclasses import dataclass, field
from typing import Literal

# vLLM's names for FP8 (E4M3) with a scale for each tensor, block or output channel.
Quantization = Literal["fp8_per_tensor", "fp8_per_block", "fp8_per_channel"]


@dataclass(kw_only=True)
class VLLMConfig:
    """For ``rollout.engine = vllm``: one engine beside each data-parallel replica's first rank.

    Or a server, with devices of its own, which all replicas use. For one that the run starts
    (``start_server``) all settings have an effect but ``sleep_level`` and ``sync_bucket_mb``; for
    one that was started for it (``server_url``) only ``max_model_len``, ``check_weights_interval``
    and what is below it, the rest being up to whoever starts it.

    Attributes:
        server_url: A vLLM server that was started for this run, as in ``http://127.0.0.1:8000``;
            None starts an engine beside each replica.
        start_server: Whether the run starts a server instead, on the machine of global rank 0, and
            ends it. Its output is in ``<output_dir>/vllm_server.log`` (of ``build_bridge`` in
            ``<output_dir>.vllm_server.log``).
        server_gpus: The GPUs that it has for itself, on that machine, as nvidia-smi counts them: as
            many as ``tensor_model_parallel_size``. Empty on a CPU.
        gpu_memory_utilization: Share of the device's memory (of the host's, on a CPU) that the
            engine may take, its weights included. The default leaves room for a trainer; a server
            has its GPUs for itself, and may take 0.9 of them.
        kv_cache_gb: Memory (10^9 bytes) of the KV cache on each GPU; None is what
            ``gpu_memory_utilization`` leaves.
        max_model_len: Longest prompt with its response; None is ``data.max_prompt_tokens`` +
            ``rollout.max_new_tokens``.
        enforce_eager: Whether nothing is compiled and no CUDA graph captured: the engine starts
            faster and generates slower.
        tensor_model_parallel_size: GPUs of one engine (vLLM's tensor parallelism): those of its
            replica's first ranks on one machine, which have to be as many; of a server its own.
        quantization: How vLLM quantises the weights of linear layers after each sync, and their
            inputs (its online quantization); None leaves them as they came. The rollouts are then
            not quite the student's: ``rollout.logprob_check_interval`` measures how far they are
            off.
        sleep_level: What the engine gives up between a rollout and the next weight sync, on a GPU:
            0 nothing, 1 the KV cache and, to the host's memory, the weights, 2 both for good; the
            sync brings all weights again, and with 0 and 1 only those that train.
        sync_bucket_mb: Size (10^6 bytes) of the buffer that weights go to the engine through. Small
            enough for the processor's cache is fastest on a CPU.
        check_weights_interval: Weight syncs from one check that the engine has the weights that
            were sent to the next, by a checksum of each tensor. None never checks.
        timeout_minutes: An engine that takes longer to start, or for a rollout, counts as hanging.
        sync_timeout_minutes: Likewise for a part of a weight sync. The replica's other ranks wait
            for it in a collective, so it has to be below ``parallel.distributed_timeout_minutes``.
        max_restarts: How often an engine that ended or hangs is started again in one step; it gets
            the weights anew and repeats what it was asked for. A server of ``server_url`` is not
            started, but waited for, ``sync_timeout_minutes`` each time. After that the run ends,
            with a checkpoint of the last whole step (unless ``checkpoint.save_interval`` is None).
    """

    server_url: str | None = None
    start_server: bool = False
    server_gpus: list[int] = field(default_factory=list)
    gpu_memory_utilization: float = 0.4
    kv_cache_gb: float | None = None
    max_model_len: int | None = None
    enforce_eager: bool = False
    tensor_model_parallel_size: int = 1
    quantization: Quantization | None = None
    sleep_level: int = 2
    sync_bucket_mb: int = 16
    check_weights_interval: int | None = None
    timeout_minutes: float = 120.0
    sync_timeout_minutes: float = 10.0
    max_restarts: int = 2

    @property
    def uses_server(self) -> bool:
        """Whether rollouts come from a server, be it the run's own."""
        return self.start_server or self.server_url is not None
