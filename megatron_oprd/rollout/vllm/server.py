"""One vLLM server: its responses, its weights and their version."""

import contextlib
import socket
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.rollout.engine import RolloutEngineError, SamplingParams, WrongWeightsError
from megatron_oprd.rollout.vllm.client import GENERATE, ServerClient
from megatron_oprd.rollout.vllm.messages import Request, Response, sampling_fields
from megatron_oprd.rollout.vllm.sockets import TrainerSocket
from megatron_oprd.weights.casting import dtype_name

_FRESH = "default"  # vLLM's label before any weights were sent
_UNFINISHED = "unfinished"  # label during a sync, and after a failed one
_SECONDS_TO_SAY_HEALTHY = 5


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A run, as a server's label of its weights names it."""

    name: str  # equal on all ranks, different in every run
    stop_ids: Collection[int]
    meaningless_ids: Collection[int]  # never sampled: they pad the embedding


class VLLMServer:
    """A server whose weights' label (vLLM's weight version) is ``OWNER#VERSION``.

    Methods raise RolloutEngineError if it fails, WrongWeightsError if it has another run's weights.
    """

    def __init__(self, url: str, *, owner: Owner, config: VLLMConfig) -> None:
        self._client = ServerClient(url)
        self._owner = owner
        self._config = config

    @property
    def url(self) -> str:
        """The server's URL."""
        return self._client.url

    @property
    def _part(self) -> float:
        return self._config.sync_timeout_minutes * 60

    def is_up(self) -> bool:
        """Whether it answers, within seconds."""
        try:
            self._client.call("/health", seconds=_SECONDS_TO_SAY_HEALTHY)
        except RolloutEngineError:
            return False
        return True

    def join(self) -> None:
        """Waits until it responds, and masks ids that the tokenizer does not know."""
        self._client.wait(self._part)
        self.mask()

    def mask(self) -> int:
        """Masks ids that the tokenizer does not know; returns the number of workers."""
        never = sorted(self._owner.meaningless_ids)
        return len(self._client.workers("oprd_mask", never, seconds=self._part))

    def has(self, version: str) -> bool:
        """Whether its weights have this run's label."""
        found = self._client.call("/weight_info", seconds=self._part)
        return found["weight_version"] == f"{self._owner.name}#{version}"

    def version(self) -> int:
        """The version of its weights; an error if it has none of this run."""
        found = self._client.call("/weight_info", seconds=self._part)
        return self._version_of(found["weight_version"])

    def set_version(self, version: str) -> None:
        """Labels the weights."""
        label = f"{self._owner.name}#{version}"
        self._client.call("/update_weight_version", {"new_version": label}, seconds=self._part)

    def pause(self) -> None:
        """Holds responses that are under way."""
        self._client.call("/pause?mode=keep", {}, seconds=self._part)

    def resume(self) -> None:
        """Lets them go on, with the weights that there are now."""
        self._client.call("/resume", {}, seconds=self._part)

    def respond(
        self, request: Request, sampling: SamplingParams, *, version: int, swaps: bool
    ) -> Response:
        """Requests a response of the weights of ``version``, or also newer ones if ``swaps``."""
        body = {
            "token_ids": list(request.prompt_ids),
            "sampling_params": sampling_fields(
                request, sampling, stop_token_ids=sorted(self._owner.stop_ids)
            ),
        }
        answer = self._client.call(GENERATE, body, seconds=self._config.timeout_minutes * 60)
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise RolloutEngineError(
                f"the vLLM server at {self.url} ended a response: {choice['finish_reason']}"
            )
        found = {self._version_of(span["version"]) for span in choice["weight_versions"]}
        if min(found) < version or (not swaps and max(found) > version):
            raise WrongWeightsError(
                f"a response of the vLLM server at {self.url} comes from weights of versions "
                f"{sorted(found)}, asked for were those of version {version}"
            )
        logprobs = choice["logprobs"]
        return Response(
            token_ids=tuple(choice["token_ids"]),
            logprobs=logprobs and tuple(one["logprob"] for one in logprobs["content"]),
            finished=choice["finish_reason"] == "stop",
            version=min(found),
        )

    def receive(
        self, invitation: dict[str, Any], options: dict[str, Any], *, dtype: torch.dtype
    ) -> list[dict[str, Any]]:
        """Lets the workers fetch weights (`WeightReceiver.oprd_receive`); returns their answers."""
        seconds = self._config.timeout_minutes * 60
        arguments = (invitation, options, dtype_name(dtype))
        return self._client.workers("oprd_receive", *arguments, seconds=seconds)

    def forget_prefixes(self) -> None:
        """Resets the prefix cache, and requests left running by an earlier, failed call."""
        forget = "/reset_prefix_cache?reset_running_requests=true"
        if not self._client.call(forget, {}, seconds=self._part)["success"]:
            raise RolloutEngineError(
                f"the vLLM server at {self.url} did not forget old weights' prefixes"
            )

    def own_address(self) -> str:
        """This machine's address as the server sees it."""
        try:
            with socket.create_connection(self._client.address, timeout=self._part) as seen:
                return seen.getsockname()[0]
        except OSError as error:
            raise RolloutEngineError(
                f"the vLLM server at {self.url} cannot be reached: {error}"
            ) from error

    def _version_of(self, label: str) -> int:
        owner, _, version = label.rpartition("#")
        if label == _FRESH or (owner == self._owner.name and version == _UNFINISHED):
            raise RolloutEngineError(
                f"the vLLM server at {self.url} has no weights of this run; was it started again?"
            )
        if owner != self._owner.name:
            raise WrongWeightsError(
                f"the vLLM server at {self.url} has weights of {owner!r}, not of "
                f"{self._owner.name!r}; give each run servers of its own"
            )
        return int(version)


class ServerSync:
    """A weight sync of one server. Errors are kept: other servers' syncs go on.

    Attributes:
        error: Why the server did not take the weights; None as long as it does.
    """

    def __init__(self, server: VLLMServer, *, pauses: bool, config: VLLMConfig) -> None:
        """With ``pauses`` responses are under way, which get the new weights in the middle."""
        self.server = server
        self.error: Exception | None = None
        self._pauses = pauses
        self._config = config
        self._workers: TrainerSocket | None = None
        self._loaded: Future | None = None

    def start(self, options: dict[str, Any], *, dtype: torch.dtype) -> None:
        """Asks the server's workers to connect, and waits for them."""
        try:
            if self._pauses:
                self.server.pause()
            # Responses sampled from partly loaded weights must not carry a valid version.
            self.server.set_version(_UNFINISHED)
            num_workers = self.server.mask()  # again: the server may have restarted
            seconds = self._config.sync_timeout_minutes * 60
            self._workers = workers = TrainerSocket(self.server.own_address(), seconds=seconds)
            # The call returns only after the transfer, which this process has to serve.
            self._loaded = loaded = _in_background(
                lambda: self.server.receive(workers.invitation, options, dtype=dtype)
            )
            workers.accept(num_workers, in_vain=loaded.done)
        except (OSError, RolloutEngineError) as error:
            self._fail(error)

    def tell(self, message: Any, data: memoryview | None = None) -> None:
        """Sends all workers of the server a message."""
        if self.error is None:
            assert self._workers is not None
            try:
                self._workers.tell(message, data)
            except OSError as error:
                self._fail(error)

    def finish(self) -> dict[str, str]:
        """Waits for the workers; returns their checksums by tensor (empty if not asked for)."""
        if self.error is not None:
            return {}
        assert self._loaded is not None
        try:
            answers = self._loaded.result(timeout=self._config.sync_timeout_minutes * 60)
            for answer in answers:
                if "error" in answer:
                    raise RolloutEngineError(answer["error"])
            self.server.forget_prefixes()
        except (OSError, RolloutEngineError) as error:
            self._fail(error)
            return {}
        return answers[0]["checksums"]

    def commit(self, version: str) -> None:
        """Gives the weights their label."""
        if self.error is None:
            try:
                self.server.set_version(version)
            except RolloutEngineError as error:
                self._fail(error)

    def close(self) -> None:
        """Closes the connections, and lets responses go on: without valid weights, they fail."""
        if self._workers is not None:
            self._workers.__exit__(None, None, None)
        if self._pauses:
            with contextlib.suppress(RolloutEngineError):
                self.server.resume()

    def _fail(self, error: Exception) -> None:
        # The server's error, if there is one, explains a broken connection.
        done = self._loaded is not None and self._loaded.done()
        own = self._loaded.exception() if self._loaded is not None and done else None
        self.error = own if isinstance(own, Exception) else error


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
