"""Settings of vLLM as a rollout engine."""

from dataclasses import dataclass
from typing import Literal

from megatron_oprd.config.setting import setting, when

MAX_TEMPERATURE = 2.0

# vLLM's names for FP8 (E4M3) with a scale for each tensor, block or output channel.
Quantization = Literal["fp8_per_tensor", "fp8_per_block", "fp8_per_channel"]
_GIVEN_SERVER = when("rollout.vllm.servers", instead="give it to vllm serve")
_ANY_SERVER = (
    _GIVEN_SERVER,
    when("rollout.vllm.start_servers", instead="leave it out"),
)


@dataclass(kw_only=True)
class VLLMConfig:
    """vLLM for rollouts: engines over all of the run's GPUs, or a server.

    The number of engines is the number of ranks divided by ``tensor_model_parallel_size``, whatever
    the trainer's layout is. A server has devices of its own, and is started by the run
    (``start_servers``) or was started for it (``servers``). A temperature is at most 2.
    """

    servers: list[str] = setting([])
    """vLLM servers that were started for this run, as in ``[http://10.0.0.5:8000,
    http://10.0.0.6:8000]``. A server that fails is left out until it is back. By default engines
    run on the trainer's GPUs."""

    start_servers: int = setting(0, ge=0)
    """Servers that the run starts, on the nodes of ``server_nodes``, and ends. Their output is in
    ``<output_dir>/vllm_server_N.log`` (of ``build_bridge`` in ``<output_dir>.vllm_server_N.log``).
    """

    server_nodes: list[int] = setting(
        [0],
        ge=0,
        only_with=when("rollout.vllm.start_servers"),
        no_effect_with=_GIVEN_SERVER,
    )
    """Nodes of the run that start the servers, the same number each, as torchrun numbers them; 0
    has global rank 0. Servers are numbered from node to node."""

    server_gpus: list[int] = setting(
        [],
        ge=0,
        only_with=when("rollout.vllm.start_servers"),
        no_effect_with=_GIVEN_SERVER,
    )
    """GPUs that the servers have for themselves on each of these nodes, as nvidia-smi counts them:
    ``tensor_model_parallel_size`` for each server of a node in turn. Empty on a CPU."""

    gpu_memory_utilization: float = setting(0.4, gt=0, lt=1, no_effect_with=_GIVEN_SERVER)
    """Share of the device's memory (of the host's, on a CPU) that the engine may take, its weights
    included. The default leaves room for a trainer. A server has its GPUs for itself, and may take
    0.9 of their memory."""

    kv_cache_gb: float | None = setting(None, gt=0, no_effect_with=_GIVEN_SERVER)
    """Memory (10^9 bytes) of the KV cache on each GPU; by default what ``gpu_memory_utilization``
    leaves."""

    max_model_len: int | None = setting(None, ge=1)
    """Most tokens of a prompt with its response; at least the default, which is
    ``data.max_prompt_tokens`` + ``rollout.max_new_tokens``."""

    enforce_eager: bool = setting(False, no_effect_with=_GIVEN_SERVER)
    """Whether nothing is compiled and no CUDA graph captured. The engine then starts faster and
    generates slower."""

    tensor_model_parallel_size: int = setting(1, ge=1, no_effect_with=_GIVEN_SERVER)
    """GPUs of one engine (vLLM's tensor parallelism), those of consecutive ranks of a machine. It
    has to divide the ranks of every machine. A server has GPUs of its own."""

    quantization: Quantization | None = setting(None, no_effect_with=_GIVEN_SERVER)
    """vLLM's online quantization of the linear layers' weights, after each sync, and of their
    inputs; by default none. Rollouts with it are not quite the student's;
    ``rollout.logprob_check_interval`` measures the difference. Needs
    ``model.params_dtype = bf16``."""

    sleep_level: int = setting(2, ge=0, le=2, no_effect_with=_ANY_SERVER)
    """Memory that the engine gives up between a rollout and the next weight sync, on a GPU. 0:
    none. 1: the KV cache and, to the host's memory, the weights. 2: both for good. The sync brings
    all weights with 2, and only those that train with 0 and 1."""

    sync_bucket_mb: int = setting(16, ge=1)
    """Size (10^6 bytes) of the chunks in which weights go to the engine, and of the buffer that
    these pass through. A larger tensor is a chunk of its own; an engine on a CPU gets it in pieces,
    and a buffer that fits in the processor's cache is fastest there. On GPUs, and to servers, each
    chunk costs a call, and vLLM's default is 1000."""

    check_weights_interval: int | None = setting(None, ge=1)
    """Weight syncs between two checks that the engine's workers got the weights that were sent, by
    a checksum of each tensor. By default they are never checked."""

    timeout_minutes: float = setting(120.0, gt=0)
    """An engine that takes longer to start, or for a rollout, counts as hanging."""

    sync_timeout_minutes: float = setting(10.0, gt=0)
    """An engine that takes longer for a part of a weight sync counts as hanging. The other ranks
    wait for it in a collective, so this time has to be below
    ``parallel.distributed_timeout_minutes``."""

    max_restarts: int = setting(2, ge=0)
    """Number of times that an engine that ended or hangs is started again in one step; 0 is never.
    The engine gets the weights anew and repeats its work. Servers of ``servers`` are not started
    again; the run waits for them, ``sync_timeout_minutes`` each time. After that the run ends, with
    a checkpoint of the last whole step (unless ``checkpoint.save_interval`` is null)."""

    @property
    def chunk_bytes(self) -> int:
        """``sync_bucket_mb`` in bytes."""
        return self.sync_bucket_mb * 10**6

    @property
    def servers_per_node(self) -> int:
        """Servers that each of ``server_nodes`` starts."""
        return self.start_servers // len(self.server_nodes)

    @property
    def uses_server(self) -> bool:
        """Whether rollouts come from servers, be they the run's own."""
        return self.start_servers > 0 or bool(self.servers)
