"""A rollout engine on vLLM servers that several ranks share."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.engine import (
    EngineUse,
    Progress,
    Rollout,
    RolloutEngineError,
    SamplingParams,
    WrongWeightsError,
)
from megatron_oprd.rollout.vllm.messages import Request, Response, requests_of, rollouts_of
from megatron_oprd.rollout.vllm.server import Owner, ServerSync, VLLMServer
from megatron_oprd.rollout.vllm.shared_memory import chunks
from megatron_oprd.rollout.vllm.sync_check import SyncCheck
from megatron_oprd.rollout.vllm.watch import ServerWatch

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Default of concurrent requests to a server: vLLM's default batch on large GPUs.
_REQUESTS = 1024


class _Count:
    """`Progress` that several threads add to."""

    def __init__(self) -> None:
        self.now = Progress()
        self._lock = threading.Lock()

    def add(self, response: Response) -> None:
        with self._lock:
            responses, tokens = self.now.responses + 1, self.now.tokens + len(response.token_ids)
            self.now = Progress(responses=responses, tokens=tokens)


_UnderWay = tuple[Sequence[Prompt], SamplingParams, ThreadPoolExecutor, _Count, Iterator[Response]]


class VLLMServersEngine:
    """A `RolloutEngine` on shared servers, to which one of its owners sends the weights.

    A request goes to the server with the fewest tokens under way. A server that fails is left out,
    and its requests are repeated on the others: with the same seeds the responses are the same. It
    is used again after the next weight sync that finds it up. Only when no server is left does a
    call fail.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,  # the servers'; weights are converted to it
        eos_token_ids: Sequence[int],
        known_ids: Collection[int],  # the tokenizer's ids; other ids pad the embedding
        # Keeps special tokens; needed for stop texts.
        decode: Callable[[Sequence[int]], str] | None = None,
        max_batch_size: int | None = None,  # concurrent requests of this engine
        owner: str,  # label of the run's weights: equal on all ranks, different in every run
        swaps: bool = False,  # whether responses may get new weights in the middle
        watches: bool = False,  # whether `take_use` tells of the servers; one engine's is enough
        config: VLLMConfig,
    ) -> None:
        """Waits for the servers and masks ids that the tokenizer does not know.

        Raises RolloutEngineError if no server responds.
        """
        assert config.servers
        self._config = config
        self._check = SyncCheck(folder, dtype=dtype, interval=config.check_weights_interval)
        self._dtype = dtype
        self._decode = decode
        self._at_once = max_batch_size or _REQUESTS * len(config.servers)
        meaningless = set(range(self._check.vocab_size)) - set(known_ids)
        of_run = Owner(
            name=owner,
            stop_ids=eos_token_ids,
            meaningless_ids=meaningless,
            tied=self._check.tied,
        )
        self._servers = [VLLMServer(url, owner=of_run, config=config) for url in config.servers]
        self._swaps = swaps
        self._under_way: deque[_UnderWay] = deque()
        self._count = _Count()  # of what a call waits for
        self._sent_version: str | None = None
        self._watch: ServerWatch | None = None
        self._on_each(self._servers, VLLMServer.join)
        if watches:
            self._watch = ServerWatch(self._servers)

    def needs_all_weights(self) -> bool:
        """Whether a server that is up restarted or got other weights since the last sync."""
        version = self._sent_version
        if version is None:
            return True
        up = [server for server in self._servers if server.is_up()]
        return not all(has for _, has in self._on_each(up, lambda server: server.has(version)))

    def load_weights(
        self,
        stream: Iterable[tuple[str, Tensor]],
        *,
        version: int = 0,
        left_out: Collection[str] = (),  # unchanged weights; of each vLLM module all or none
    ) -> None:
        """Replaces the servers' weights by the stream's full tensors, under Hugging Face names.

        Raises:
            ValueError: Unknown name, wrong shape, duplicate or missing weight.
            RolloutEngineError: No server took the weights; the stream may not be exhausted.
            WrongWeightsError: The weights read back differ from the weights sent.
        """
        if left_out and self.needs_all_weights():  # changed since the caller asked
            raise self._not_taken(version, "a server has lost the last sync's weights")
        self._sent_version = None
        weights = self._check.passing(stream, left_out=left_out)
        up = [server for server in self._servers if server.is_up()]
        pauses = bool(self._under_way)
        syncs = [ServerSync(server, pauses=pauses) for server in up]
        if not syncs:
            raise self._not_taken(version, "no server is up")
        with ExitStack() as stack, ThreadPoolExecutor(len(syncs)) as pool:
            for sync in syncs:
                stack.callback(sync.close)
            list(pool.map(lambda sync: sync.start(keep_digests=self._check.is_due), syncs))
            self._check_any(syncs, version)
            for chunk in chunks(weights, dtype=self._dtype, num_bytes=self._config.chunk_bytes):
                list(pool.map(lambda sync: sync.send(chunk), syncs))  # noqa: B023
                self._check_any(syncs, version)
            if self._check.is_due:
                for digests in pool.map(ServerSync.digests, syncs):
                    self._check.compare(digests, version)
            list(pool.map(lambda sync: sync.commit(str(version)), syncs))
        self._check_any(syncs, version)
        for sync in syncs:
            if sync.error is not None:
                _say_left_out(sync.server, sync.error)
        self._sent_version = str(version)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Samples ``samples_per_prompt`` responses per prompt, ordered by prompt, then sample.

        Raises:
            RolloutEngineError: No server is left that has weights.
            WrongWeightsError: A server has another run's weights.
        """
        return self._finished(self._begun(prompts, sampling))

    def start(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Starts `generate` in the background; see `OverlappingEngine`."""
        self._under_way.append(self._begun(prompts, sampling))

    def finish(self) -> list[Rollout]:
        """Waits for the rollouts of the first `start`; result and errors as in `generate`."""
        assert self._under_way, "nothing was begun"
        return self._finished(self._under_way.popleft())

    def _begun(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> _UnderWay:
        requests = requests_of(prompts, sampling)
        version, servers = self._with_weights()
        router = _Router(servers)
        pool = ThreadPoolExecutor(self._at_once)
        count = _Count()

        def respond(request: Request) -> Response:
            found = _respond(router, request, sampling, version=version, swaps=self._swaps)
            count.add(found)
            return found

        return prompts, sampling, pool, count, pool.map(respond, requests)

    def _finished(self, under_way: _UnderWay) -> list[Rollout]:
        prompts, sampling, pool, self._count, coming = under_way
        try:
            responses = list(coming)
        finally:
            # After an error, do not wait for the other requests.
            pool.shutdown(wait=False, cancel_futures=True)
        return rollouts_of(prompts, sampling, responses, decode=self._decode)

    def _with_weights(self) -> tuple[int, list[VLLMServer]]:
        """The newest version of the run's weights, and the servers that have it."""
        found = self._on_each(self._servers, VLLMServer.version)
        newest = max(version for _, version in found)
        return newest, [server for server, version in found if version == newest]

    def _on_each(
        self, servers: Sequence[VLLMServer], call: Callable[[VLLMServer], Result]
    ) -> list[tuple[VLLMServer, Result]]:
        """Servers and results of the calls that succeed; the first error if none does."""
        found: list[tuple[VLLMServer, Result]] = []
        errors: list[tuple[VLLMServer, RolloutEngineError]] = []
        lock = threading.Lock()

        def one(server: VLLMServer) -> None:
            try:
                result = call(server)
            except WrongWeightsError:
                raise
            except RolloutEngineError as error:
                with lock:
                    errors.append((server, error))
            else:
                with lock:
                    found.append((server, result))

        if servers:
            with ThreadPoolExecutor(len(servers)) as pool:
                list(pool.map(one, servers))
        if errors and not found:
            raise errors[0][1]
        for server, error in errors:
            _say_left_out(server, error)
        return found

    def _check_any(self, syncs: Sequence[ServerSync], version: int) -> None:
        """Raises RolloutEngineError if no server takes the weights any more."""
        if all(sync.error is not None for sync in syncs):
            raise self._not_taken(version, syncs[0].error) from syncs[0].error

    def _not_taken(self, version: int, why: object) -> RolloutEngineError:
        urls = ", ".join(server.url for server in self._servers)
        return RolloutEngineError(f"vLLM ({urls}) did not take weight sync {version}: {why}")

    def progress(self) -> Progress:
        """This engine's whole responses of those that a call waits for."""
        return self._count.now

    def take_use(self) -> EngineUse | None:
        """See `MeasuringEngine`: of all servers, and of all ranks' requests."""
        return None if self._watch is None else self._watch.take()

    def sleep(self) -> None:
        """Does nothing: servers have their own devices."""

    def close(self) -> None:
        """Cancels requests that have not started; the servers keep running."""
        if self._watch is not None:
            self._watch.close()
        while self._under_way:
            _, _, pool, _, _ = self._under_way.popleft()
            pool.shutdown(wait=False, cancel_futures=True)
        for server in self._servers:
            server.disconnect()


class _Router:
    """Sends requests to the server with the fewest tokens under way. Thread-safe."""

    def __init__(self, servers: Sequence[VLLMServer]) -> None:
        self._tokens = dict.fromkeys(servers, 0)
        self._lock = threading.Lock()
        self._error: RolloutEngineError | None = None

    @contextmanager
    def server(self, tokens: int) -> Iterator[VLLMServer]:
        """A server for a request of at most so many tokens; the last error if none is left."""
        with self._lock:
            if not self._tokens:
                assert self._error is not None
                raise self._error
            server = min(self._tokens, key=lambda one: self._tokens[one])
            self._tokens[server] += tokens
        try:
            yield server
        finally:
            with self._lock:
                if server in self._tokens:
                    self._tokens[server] -= tokens

    def leave_out(self, server: VLLMServer, error: RolloutEngineError) -> None:
        """Sends the server no more requests."""
        with self._lock:
            if self._tokens.pop(server, None) is None:
                return  # another request of it failed before
            self._error = error
            is_last = not self._tokens
        if not is_last:
            _say_left_out(server, error)


def _respond(
    router: _Router, request: Request, sampling: SamplingParams, *, version: int, swaps: bool
) -> Response:
    """One response, from the first server that gives it."""
    while True:
        with router.server(len(request.prompt_ids) + sampling.max_new_tokens) as server:
            try:
                return server.respond(request, sampling, version=version, swaps=swaps)
            except WrongWeightsError:
                raise
            except RolloutEngineError as error:
                router.leave_out(server, error)


def _say_left_out(server: VLLMServer, error: Exception) -> None:
    logger.warning("the vLLM server at %s is left out until the next sync: %s", server.url, error)
