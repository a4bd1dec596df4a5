"""vLLM in a process of its own: ``python -m megatron_oprd.rollout.vllm_process DESCRIPTOR``.

Started by `megatron_oprd.rollout.vllm.VLLMEngine`, which talks to it over an inherited pipe. vLLM
takes torch.distributed's world for its own and makes its groups from all of its ranks, so inside a
trainer with several ranks every one of them would have to build an engine. It also binds the
process to threads and memory nodes, and ends the process group with the engine. Here it has a world
of one, and the trainer's stays as it is.
"""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from torch import Tensor

from megatron_oprd.rollout.bucket import ReceivingBucket, keep_freed_memory
from megatron_oprd.rollout.engine import SamplingParams
from megatron_oprd.rollout.vllm_messages import EngineSettings, Request, Response, sampling_fields
from megatron_oprd.rollout.vllm_weights import checksums_of_engine, mask_ids, with_tied_head

# Before vLLM is imported. In one process, so that weights need not be sent on to another.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class Engine:
    """vLLM's ``LLM``, its weights and their version."""

    def __init__(self, settings: EngineSettings, receive: Callable[[], Any]) -> None:
        """Builds vLLM's engine with weights that mean nothing.

        Args:
            settings: How.
            receive: Returns the next message: of a weight stream a list of pieces, None at its end.
        """
        from vllm import LLM

        self._settings = settings
        self._receive = receive
        self._llm = LLM(
            str(settings.folder),
            dtype=str(settings.dtype).removeprefix("torch."),
            load_format="dummy",
            generation_config="vllm",
            skip_tokenizer_init=True,
            disable_log_stats=True,
            logprobs_mode="raw_logprobs",
            enable_sleep_mode=settings.sleep_level > 0,
            **settings.options,
        )
        if settings.meaningless_ids:
            self._llm.apply_model(lambda model: mask_ids(model, settings.meaningless_ids))
        self._bucket = ReceivingBucket(settings.bucket)
        self._version: int | None = None
        self._asleep = False

    def load_weights(self, version: int, keep: bool) -> dict[str, str]:
        """Replaces all weights by the stream that follows.

        Args:
            version: The number that rollouts with these weights come back with.
            keep: Whether to read the engine's weights afterwards.

        Returns:
            With ``keep`` the checksum of every tensor as the engine has it, by name; else nothing.
        """
        self._version = None  # until all have come: half of them are no model
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        shapes: dict[str, tuple[int, ...]] = {}
        weights = with_tied_head(self._incoming(), shapes, tied=self._settings.tied)
        self._llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": weights, "is_checkpoint_format": True}
        )
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not forget the old weights' prefixes")
        self._version = version
        if not keep:
            return {}
        (found,) = self._llm.apply_model(lambda model: checksums_of_engine(model, shapes))
        return found

    def _incoming(self) -> Iterator[tuple[str, Tensor]]:
        while (pieces := self._receive()) is not None:
            yield from self._bucket.take(pieces)

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams
    ) -> tuple[int, list[Response]]:
        """Generates the responses, in the order of ``requests``, and names the weights' version."""
        from vllm import SamplingParams as VLLMSamplingParams

        if self._version is None:
            raise RuntimeError("generate() before load_weights(): the model has no weights yet")
        if self._asleep:
            raise RuntimeError("generate() after sleep(): load_weights() wakes the engine")
        params = [
            VLLMSamplingParams(
                **sampling_fields(request, sampling, stop_token_ids=self._settings.stop_token_ids)
            )
            for request in requests
        ]
        prompts: Any = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        responses = []
        for output in outputs:
            (completion,) = output.outputs
            tokens = tuple(completion.token_ids)
            assert completion.logprobs is not None
            assert completion.finish_reason in ("stop", "length"), completion.finish_reason
            responses.append(
                Response(
                    token_ids=tokens,
                    logprobs=tuple(
                        of[token].logprob
                        for token, of in zip(tokens, completion.logprobs, strict=True)
                    ),
                    finished=completion.finish_reason == "stop",
                )
            )
        return self._version, responses

    def sleep(self) -> None:
        """Gives up what memory the settings say, until the next `load_weights`."""
        if self._settings.sleep_level and not self._asleep:
            self._llm.sleep(level=self._settings.sleep_level)
            self._asleep = True


def serve(connection: Connection) -> None:
    """Answers calls until the other end closes: (method, arguments) -> (True, what it returned).

    An exception is answered with (False, its traceback).
    """
    engine: Engine | None = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            if method == "build":
                engine = Engine(arguments[0], lambda: _acknowledged(connection))
                answer: Any = None
            else:
                answer = getattr(engine, method)(*arguments)
        except EOFError:
            return
        except Exception:
            connection.send((False, traceback.format_exc()))
        else:
            connection.send((True, answer))


def _acknowledged(connection: Connection) -> Any:
    """The next filling of the bucket. Asking for it says that the one before it was taken."""
    connection.send("next")
    return connection.recv()


def main() -> None:
    """Serves on the pipe whose descriptor is the argument."""
    # However the trainer ends, this process does not outlive it.
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    keep_freed_memory()
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
