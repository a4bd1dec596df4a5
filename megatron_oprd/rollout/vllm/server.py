"""A rollout engine on a vLLM server that all replicas share."""

import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.engine import (
    Rollout,
    RolloutEngineError,
    SamplingParams,
    WrongWeightsError,
)
from megatron_oprd.rollout.vllm.client import GENERATE, ServerClient
from megatron_oprd.rollout.vllm.messages import (
    Request,
    Response,
    requests_of,
    rollouts_of,
    sampling_fields,
)
from megatron_oprd.rollout.vllm.sockets import TrainerSocket, send_weights
from megatron_oprd.rollout.vllm.sync_check import SyncCheck
from megatron_oprd.weights.casting import dtype_name

# Default of concurrent requests: vLLM's default batch on large GPUs.
_REQUESTS = 1024
_FRESH = "default"  # vLLM's label before any weights were sent
_UNFINISHED = "unfinished"  # label during a sync, and after a failed one

_UnderWay = tuple[
    Sequence[Prompt], SamplingParams, ThreadPoolExecutor, Iterator[tuple[int, Response]]
]


class VLLMServerEngine:
    """A `RolloutEngine` on a shared server, to which one replica's leader sends the weights.

    The server stores a label of its weights (vLLM's weight version), ``OWNER#VERSION``, and returns
    it with each response.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,  # the server's; weights are converted to it
        eos_token_ids: Sequence[int],
        known_ids: Collection[int],  # the tokenizer's ids; other ids pad the embedding
        # Keeps special tokens; needed for stop texts.
        decode: Callable[[Sequence[int]], str] | None = None,
        max_batch_size: int | None = None,  # concurrent requests of this engine
        owner: str,  # label of the run's weights: equal on all replicas, different in every run
        config: VLLMConfig,
    ) -> None:
        """Waits for the server and masks ids that the tokenizer does not know.

        Raises RolloutEngineError if the server does not respond.
        """
        assert config.server_url is not None
        self._config = config
        self._check = SyncCheck(folder, dtype=dtype, interval=config.check_weights_interval)
        self._dtype = dtype
        self._stop_ids = list(eos_token_ids)
        self._decode = decode
        self._at_once = max_batch_size or _REQUESTS
        self._owner = owner
        self._under_way: _UnderWay | None = None
        self._sent_label: str | None = None
        self._server = ServerClient(config.server_url)
        self._server.wait(self._part)
        self._never = sorted(set(range(self._check.vocab_size)) - set(known_ids))
        self._mask()

    def _mask(self) -> int:
        """Masks ids that the tokenizer does not know; returns the number of workers."""
        return len(self._server.workers("oprd_mask", self._never, seconds=self._part))

    @property
    def _part(self) -> float:
        return self._config.sync_timeout_minutes * 60

    def needs_all_weights(self) -> bool:
        """Whether the server restarted or got other weights since this engine's last sync."""
        if self._sent_label is None:
            return True
        found = self._server.call("/weight_info", seconds=self._part)
        return found["weight_version"] != self._sent_label

    def load_weights(
        self,
        stream: Iterable[tuple[str, Tensor]],
        *,
        version: int = 0,
        left_out: Collection[str] = (),  # unchanged weights; of each vLLM module all or none
    ) -> None:
        """Replaces the server's weights by the stream's full tensors, under Hugging Face names.

        Raises:
            ValueError: Unknown name, wrong shape, duplicate or missing weight.
            RolloutEngineError: The server failed; the stream may not be exhausted.
            WrongWeightsError: The weights read back differ from the weights sent.
        """
        if left_out and self.needs_all_weights():  # changed since the caller asked
            raise self._not_taken(version, "it does not have the last sync's weights any more")
        self._sent_label = None
        # Responses sampled from partly loaded weights must not carry a valid version.
        self._set_version(_UNFINISHED)
        num_workers = self._mask()  # again: the server may have restarted
        weights = self._check.passing(stream, left_out=left_out)
        host = self._own_address()
        options = {
            "tied": self._check.tied,
            "keep": self._check.is_due,
            "left_out": self._check.left_out_shapes(left_out),
        }
        try:
            listening = TrainerSocket(host, seconds=self._part)
        except OSError as error:
            raise self._not_taken(version, f"no port on {host}: {error}") from error
        with listening as workers:
            # The call returns only after the transfer, which this thread has to serve.
            loaded = _in_background(
                lambda: self._server.workers(
                    "oprd_receive",
                    *(workers.invitation, options, dtype_name(self._dtype)),
                    seconds=self._config.timeout_minutes * 60,
                )
            )
            try:
                workers.accept(num_workers, in_vain=loaded.done)
                send_weights(workers, weights, dtype=self._dtype)
                answers = loaded.result(timeout=self._part)
            except OSError as error:
                # The server's error, if there is one, explains a broken connection.
                why = loaded.exception() if loaded.done() else None
                raise self._not_taken(version, why or error) from error
        for answer in answers:
            if "error" in answer:
                raise self._not_taken(version, answer["error"])
        # Also resets requests left running by an earlier, failed call, whose cache would stay.
        forget = "/reset_prefix_cache?reset_running_requests=true"
        if not self._server.call(forget, {}, seconds=self._part)["success"]:
            raise self._not_taken(version, "old weights' prefixes were not forgotten")
        if self._check.is_due:
            self._check.compare(answers[0]["checksums"], version)
        self._sent_label = self._set_version(str(version))

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Samples ``samples_per_prompt`` responses per prompt, ordered by prompt, then sample.

        Raises:
            RolloutEngineError: The server failed, or has no weights.
            WrongWeightsError: It has another run's weights.
        """
        self.start(prompts, sampling)
        return self.finish()

    def start(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Starts `generate` in the background. The next call must be `finish`."""
        requests = requests_of(prompts, sampling)
        pool = ThreadPoolExecutor(self._at_once)
        answers = pool.map(lambda one: self._respond(one, sampling), requests)
        self._under_way = prompts, sampling, pool, answers

    def finish(self) -> list[Rollout]:
        """Waits for the rollouts of `start`; result and errors as in `generate`."""
        assert self._under_way is not None, "nothing was begun"
        (prompts, sampling, pool, coming), self._under_way = self._under_way, None
        try:
            answers = list(coming)
        finally:
            # After an error, do not wait for the other requests.
            pool.shutdown(wait=False, cancel_futures=True)
        if not answers:
            return []
        versions = {version for version, _ in answers}
        if len(versions) > 1:
            raise WrongWeightsError(
                f"the vLLM server's weights changed during a rollout, versions {sorted(versions)}"
            )
        responses = [response for _, response in answers]
        version = versions.pop()
        return rollouts_of(prompts, sampling, responses, version=version, decode=self._decode)

    def _respond(self, request: Request, sampling: SamplingParams) -> tuple[int, Response]:
        """Requests one response; returns the version of its weights and the response."""
        body = {
            "token_ids": list(request.prompt_ids),
            "sampling_params": sampling_fields(request, sampling, stop_token_ids=self._stop_ids),
        }
        seconds = self._config.timeout_minutes * 60
        answer = self._server.call(GENERATE, body, seconds=seconds)
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise RolloutEngineError(
                f"the vLLM server at {self._server.url} ended a response: {choice['finish_reason']}"
            )
        versions = {self._version_of(span["version"]) for span in choice["weight_versions"]}
        if len(versions) != 1:
            raise WrongWeightsError(f"a response comes from weights of versions {sorted(versions)}")
        logprobs = choice["logprobs"]
        response = Response(
            token_ids=tuple(choice["token_ids"]),
            logprobs=logprobs and tuple(one["logprob"] for one in logprobs["content"]),
            finished=choice["finish_reason"] == "stop",
        )
        return versions.pop(), response

    def _not_taken(self, version: int, why: object) -> RolloutEngineError:
        return RolloutEngineError(
            f"the vLLM server at {self._server.url} did not take weight sync {version}: {why}"
        )

    def _own_address(self) -> str:
        """This machine's address as the server sees it."""
        try:
            with socket.create_connection(self._server.address, timeout=self._part) as seen:
                return seen.getsockname()[0]
        except OSError as error:
            raise RolloutEngineError(
                f"the vLLM server at {self._server.url} cannot be reached: {error}"
            ) from error

    def _set_version(self, version: str) -> str:
        label = f"{self._owner}#{version}"
        self._server.call("/update_weight_version", {"new_version": label}, seconds=self._part)
        return label

    def _version_of(self, label: str) -> int:
        owner, _, version = label.rpartition("#")
        if label == _FRESH or (owner == self._owner and version == _UNFINISHED):
            raise RolloutEngineError(
                f"the vLLM server at {self._server.url} has no weights of this run; was it started "
                "again?"
            )
        if owner != self._owner:
            raise WrongWeightsError(
                f"the vLLM server at {self._server.url} has weights of {owner!r}, not of "
                f"{self._owner!r}; give each run a server of its own"
            )
        return int(version)

    def sleep(self) -> None:
        """Does nothing: the server has its own devices."""

    def close(self) -> None:
        """Cancels requests that have not started; the server keeps running."""
        if self._under_way is not None:
            (_, _, pool, _), self._under_way = self._under_way, None
            pool.shutdown(wait=False, cancel_futures=True)


def _in_background(call: Callable[[], Any]) -> Future:
    """Runs a call in a daemon thread, which does not delay the process's exit."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # the future carries it to the waiting thread
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
