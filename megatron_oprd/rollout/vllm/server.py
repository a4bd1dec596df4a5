"""A rollout engine on a vLLM server: one for all replicas."""

import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.config.schema import VLLMConfig
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

# Requests that are under way at once, where no setting says how many: what vLLM generates at once
# on large GPUs unless it is told otherwise.
_REQUESTS = 1024
_FRESH = "default"  # the version of a server that nobody has sent weights
_UNFINISHED = "unfinished"

_UnderWay = tuple[
    Sequence[Prompt], SamplingParams, ThreadPoolExecutor, Iterator[tuple[int, Response]]
]


class VLLMServerEngine:
    """A `RolloutEngine` on a server that is shared: one replica's leader sends the weights.

    The server keeps the weights' version and says it with each response (vLLM's weight versions),
    together with whose weights they are.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        eos_token_ids: Sequence[int],
        known_ids: Collection[int],
        decode: Callable[[Sequence[int]], str] | None = None,
        max_batch_size: int | None = None,
        owner: str,
        config: VLLMConfig,
    ) -> None:
        """Waits for the server, and has it never sample ids that mean nothing.

        Args:
            folder: The student's Hugging Face folder.
            dtype: The server's type, which weights are converted to.
            eos_token_ids: A response ends with any of these.
            known_ids: The tokenizer's ids. Others, which only pad the embedding, are never sampled.
            decode: The tokenizer's decoding, special tokens kept; without it there are no stop
                texts.
            max_batch_size: Most requests of this engine that are under way at once.
            owner: Whose weights the server has; the same on every replica, another in another run.
            config: The settings, ``server_url`` among them.

        Raises:
            RolloutEngineError: The server is not there.
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
        """Has the server never sample ids that mean nothing; how many workers it has."""
        return len(self._server.workers("oprd_mask", self._never, seconds=self._part))

    @property
    def _part(self) -> float:
        return self._config.sync_timeout_minutes * 60

    def needs_all_weights(self) -> bool:
        """Whether the server does not have what this sent last: started anew, or sent others'.

        Raises:
            RolloutEngineError: The server does not say.
        """
        if self._sent_label is None:
            return True
        found = self._server.call("/weight_info", seconds=self._part)
        return found["weight_version"] != self._sent_label

    def load_weights(
        self,
        stream: Iterable[tuple[str, Tensor]],
        *,
        version: int = 0,
        left_out: Collection[str] = (),
    ) -> None:
        """Replaces weights of the server's model.

        Args:
            stream: Full tensors, under the names they have in a Hugging Face checkpoint.
            version: The number that rollouts with these weights come back with.
            left_out: Names of weights that do not come and stay as they are: of each of vLLM's
                modules all weights or none.

        Raises:
            ValueError: A name that the model lacks, a wrong shape, a weight that came twice or not
                at all.
            RolloutEngineError: The server failed. The stream may not have come to its end.
            WrongWeightsError: A check found other weights than were sent.
        """
        if left_out and self.needs_all_weights():  # since it was asked
            raise self._not_taken(version, "it does not have the last sync's weights any more")
        self._sent_label = None
        self._set_version(_UNFINISHED)
        num_workers = self._mask()  # it may be another server than the last time
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
                # The server's own error says more, where there is one.
                why = loaded.exception() if loaded.done() else None
                raise self._not_taken(version, why or error) from error
        for answer in answers:
            if "error" in answer:
                raise self._not_taken(version, answer["error"])
        # Also of what an earlier, failed call left running, whose cache would stay otherwise.
        forget = "/reset_prefix_cache?reset_running_requests=true"
        if not self._server.call(forget, {}, seconds=self._part)["success"]:
            raise self._not_taken(version, "old weights' prefixes were not forgotten")
        if self._check.is_due:
            self._check.compare(answers[0]["checksums"], version)
        self._sent_label = self._set_version(str(version))

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Samples ``samples_per_prompt`` responses a prompt, ordered by prompt, then sample.

        A response with a stop text is generated to its end, and then cut.

        Raises:
            RolloutEngineError: The server failed, or has no weights.
            WrongWeightsError: It has another run's weights.
        """
        self.start(prompts, sampling)
        return self.finish()

    def start(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Begins what `generate` does. No other call may come before `finish`."""
        requests = requests_of(prompts, sampling)
        pool = ThreadPoolExecutor(self._at_once)
        answers = pool.map(lambda one: self._respond(one, sampling), requests)
        self._under_way = prompts, sampling, pool, answers

    def finish(self) -> list[Rollout]:
        """Waits for what was begun, and returns what `generate` does.

        Raises:
            RolloutEngineError: See `generate`.
            WrongWeightsError: See `generate`.
        """
        assert self._under_way is not None, "nothing was begun"
        (prompts, sampling, pool, coming), self._under_way = self._under_way, None
        try:
            answers = list(coming)
        finally:
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
        """The version of the weights that a response comes from, and the response."""
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
        """Does nothing: the server has devices of its own."""

    def close(self) -> None:
        """Asks for nothing more; the server goes on."""
        if self._under_way is not None:
            (_, _, pool, _), self._under_way = self._under_way, None
            pool.shutdown(wait=False, cancel_futures=True)


def _in_background(call: Callable[[], Any]) -> Future:
    """What a call comes to. At the process's end it is not waited for."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # whatever it is, who waits for the future has to know
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
