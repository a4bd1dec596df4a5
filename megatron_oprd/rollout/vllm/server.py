"""One vLLM server: its responses, its weights and their version."""

import contextlib
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.rollout.engine import RolloutEngineError, SamplingParams, WrongWeightsError
from megatron_oprd.rollout.vllm.client import GENERATE, ServerClient, ServerError
from megatron_oprd.rollout.vllm.messages import Request, Response, sampling_fields
from megatron_oprd.rollout.vllm.shared_memory import Chunk
from megatron_oprd.rollout.vllm.transfers import ServerTransfer, open_server_transfer

Result = TypeVar("Result")

_FRESH = "default"  # vLLM's label before any weights were sent
_UNFINISHED = "unfinished"  # label during a sync, and after a failed one
_SECONDS_TO_SAY_HEALTHY = 5
_SECONDS_TO_CLOSE = 30  # an update of a server that may hang


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A run, as a server's label of its weights names it."""

    name: str  # equal on all ranks, different in every run
    stop_ids: Collection[int]
    meaningless_ids: Collection[int]  # never sampled: they pad the embedding
    tied: bool  # the LM head is the embedding


class VLLMServer:
    """A server whose weights' label (vLLM's weight version) is ``OWNER#VERSION``.

    It is also the `transfer_client.Client` of its weight transfer: HTTP carries the calls alone.
    Methods raise RolloutEngineError if it fails, WrongWeightsError if it has another run's weights.
    """

    def __init__(self, url: str, *, owner: Owner, config: VLLMConfig) -> None:
        self._client = ServerClient(url)
        self._owner = owner
        self._config = config
        self._transfer: ServerTransfer | None = None
        self._sent_label: str | None = None  # of the last whole update by this object

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

    def metrics(self) -> str:
        """What it offers to Prometheus, as text; an error if it does not answer within seconds."""
        return self._client.text("/metrics", seconds=_SECONDS_TO_SAY_HEALTHY)

    def join(self) -> None:
        """Waits until it responds, and masks ids that the tokenizer does not know."""
        self._client.wait(self._part)
        self._prepare(keep_digests=False)

    def _prepare(self, *, keep_digests: bool) -> None:
        never = sorted(self._owner.meaningless_ids)
        arguments = (never, self._owner.tied, keep_digests)
        self._client.workers("oprd_prepare", *arguments, seconds=self._part)

    def has(self, version: str) -> bool:
        """Whether its weights have this run's label."""
        return self._label() == f"{self._owner.name}#{version}"

    def version(self) -> int:
        """The version of its weights; an error if it has none of this run."""
        return self._version_of(self._label())

    def _label(self) -> str:
        return self._client.call("/weight_info", seconds=self._part)["weight_version"]

    def begin_update(self, *, keep_digests: bool) -> None:
        """Connects the workers, unless they are, and starts an update."""
        label = self._label()
        if label.rpartition("#")[2] == _UNFINISHED:
            self.abandon_update()  # of a run that did not come to its sync's end
        # Responses sampled from partly loaded weights must not carry a valid version.
        unfinished = f"{self._owner.name}#{_UNFINISHED}"
        self._client.call("/update_weight_version", {"new_version": unfinished}, seconds=self._part)
        self._prepare(keep_digests=keep_digests)  # again: the server may have restarted
        if self._transfer is None or label != self._sent_label:
            self._connect()
        self.start_weight_update()

    def _connect(self) -> None:
        self.disconnect()
        # Another run's connection, if it has one.
        self._client.call("/shutdown_weight_transfer_engine", {}, seconds=self._part)
        workers = self._client.workers("oprd_describe", seconds=self._part)
        self._transfer = open_server_transfer(
            self,
            workers[0]["weight_transfer"],
            host=self.own_address(),
            num_workers=len(workers),
            seconds=self._part,
            num_bytes=self._config.chunk_bytes,
        )

    def send(self, chunk: Chunk) -> None:
        """Sends a chunk to its workers; also OSError."""
        assert self._transfer is not None, "no update was begun"
        self._transfer.send(chunk)

    def digests(self) -> list[dict[str, str]]:
        """The checksums of what each worker got since `begin_update`, by name."""
        return self._client.workers("oprd_digests", seconds=self._part)

    def commit_update(self, version: str) -> None:
        """Ends an update, and labels the weights."""
        # Before the label, without which no response counts. Requests may still run that an
        # earlier, failed call left.
        forget = "/reset_prefix_cache?reset_running_requests=true"
        if not self._client.call(forget, {}, seconds=self._part)["success"]:
            raise RolloutEngineError(
                f"the vLLM server at {self.url} did not forget old weights' prefixes"
            )
        self._sent_label = f"{self._owner.name}#{version}"
        self.finish_weight_update(self._sent_label)

    def abandon_update(self) -> None:
        """Ends an update that did not come to its end; the label stays.

        Until then the server's modules have no memory, and a request would end it.
        """
        # vLLM finishes only what it has as started, which an update that failed is not. It refuses
        # to start what is started.
        refused: ServerError | None = None
        try:
            self._client.call("/start_weight_update", {}, seconds=_SECONDS_TO_CLOSE)
        except ServerError as error:
            refused = error
        try:
            self._client.call("/finish_weight_update", {}, seconds=_SECONDS_TO_CLOSE)
        except ServerError as error:
            raise refused or error from error

    def disconnect(self) -> None:
        """Ends the connection with its workers, if there is one."""
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See `transfer_client.Client`, as for the next three."""
        body = {"init_info": init_info}
        self._client.call("/init_weight_transfer_engine", body, seconds=self._part)

    def start_weight_update(self) -> None:
        """Begins an update."""
        self._client.call("/start_weight_update", {}, seconds=self._part)

    def update_weights(self, update_info: Any) -> None:
        """Takes a chunk."""
        self._client.call("/update_weights", {"update_info": update_info}, seconds=self._part)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Ends it."""
        body = {"weight_version": weight_version}
        self._client.call("/finish_weight_update", body, seconds=self._part)

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

    def __init__(self, server: VLLMServer, *, pauses: bool) -> None:
        """With ``pauses`` responses are under way, which get the new weights in the middle."""
        self.server = server
        self.error: Exception | None = None
        self._pauses = pauses
        self._is_whole = False

    def start(self, *, keep_digests: bool) -> None:
        """Connects the server's workers and starts the update."""
        if self._pauses:
            self._try(self.server.pause)
        self._try(lambda: self.server.begin_update(keep_digests=keep_digests))

    def send(self, chunk: Chunk) -> None:
        """Sends a chunk to the server's workers."""
        self._try(lambda: self.server.send(chunk))

    def digests(self) -> list[dict[str, str]]:
        """Checksums of what each worker got, by name."""
        return self._try(self.server.digests) or []

    def commit(self, version: str) -> None:
        """Ends the update and gives the weights their label."""
        self._try(lambda: self.server.commit_update(version))
        self._is_whole = self.error is None

    def close(self) -> None:
        """Ends an update that is not whole, and lets responses go on: without weights they fail."""
        if not self._is_whole:
            self.server.disconnect()
            with contextlib.suppress(RolloutEngineError):
                self.server.abandon_update()
        if self._pauses:
            with contextlib.suppress(RolloutEngineError):
                self.server.resume()

    def _try(self, call: Callable[[], Result]) -> Result | None:
        """The call's result; None if it fails, or something failed before."""
        if self.error is None:
            try:
                return call()
            except (OSError, RolloutEngineError) as error:
                self.error = error
        return None
