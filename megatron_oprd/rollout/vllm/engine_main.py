"""vLLM's process: ``python -m megatron_oprd.rollout.vllm.engine_main PIPE PROGRESS``.

`VLLMEngine` starts it and talks to it over an inherited pipe; how far it is stands in inherited
memory (`SharedProgress`). It is a separate process because vLLM
uses the process's torch.distributed world: in a trainer with several ranks, every rank would have
to build an engine. vLLM also binds threads and memory nodes, and destroys the process group when
the engine ends.
"""

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from megatron_oprd.rollout.engine import EngineUse, Progress, SamplingParams
from megatron_oprd.rollout.vllm.messages import (
    EXTENSION,
    EngineSettings,
    Request,
    Response,
    sampling_fields,
)
from megatron_oprd.rollout.vllm.progress import SharedProgress
from megatron_oprd.weights.casting import dtype_name

# Set before vLLM is imported: scheduler (and a single worker) in this process, threads not bound to
# cores.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


_SECONDS_BETWEEN_LOOKS = 0.1
# vLLM's names of its metrics.
_CACHE = "vllm:kv_cache_usage_perc"
_RESPONSES, _TOKENS = "vllm:request_success", "vllm:generation_tokens"


class Engine:
    """vLLM's ``LLM``, its weights and their version."""

    def __init__(self, settings: EngineSettings, *, progress: SharedProgress) -> None:
        """Builds vLLM's engine with dummy weights."""
        from vllm import LLM

        self._progress = progress
        self._settings = settings
        self._llm = LLM(
            str(settings.folder),
            dtype=dtype_name(settings.dtype),
            load_format="dummy",
            generation_config="vllm",
            skip_tokenizer_init=True,
            disable_log_stats=False,  # for `EngineUse`
            logprobs_mode="raw_logprobs",
            enable_sleep_mode=settings.sleep_level > 0,
            worker_extension_cls=EXTENSION,
            **settings.options,
        )
        self._version: int | None = None
        self._asleep = False

    def gpu_uuids(self) -> list[str]:
        """The GPUs of the workers; empty on a CPU."""
        return [uuid for uuid in self._llm.collective_rpc("oprd_gpu") if uuid is not None]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See `transfer_client.Client`, as for the next three."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Without `prepare` weights are those of an older version, and not looked at."""
        self._llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        """Takes a chunk."""
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self) -> None:
        """Ends the update; `commit` makes its weights usable."""
        self._llm.finish_weight_update()

    def prepare(self, keep_digests: bool) -> None:
        """Before an update: the weights count as lost, and wake if they sleep."""
        self._version = None  # a partial load is not a usable model
        if self._asleep:
            # Weights only: the KV cache wakes after the transfer, which lowers the sync's peak
            # memory.
            self._llm.wake_up(tags=["weights"])
        never = list(self._settings.meaningless_ids)
        self._llm.collective_rpc("oprd_prepare", args=(never, self._settings.tied, keep_digests))

    def commit(self, version: int) -> list[dict[str, str]]:
        """After an update: rollouts carry ``version``.

        Returns the checksums of the tensors that each worker got, by name; empty unless `prepare`
        was told to keep them.
        """
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not forget the old weights' prefixes")
        self._version = version
        return self._llm.collective_rpc("oprd_digests")

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams
    ) -> tuple[list[Response], EngineUse]:
        """Returns the responses, in the order of ``requests``, and the engine's use."""
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
        started = time.perf_counter()
        with _Watch(self._llm, self._progress) as watch:
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        responses = []
        for output in outputs:
            (completion,) = output.outputs
            tokens = tuple(completion.token_ids)
            assert completion.finish_reason in ("stop", "length"), completion.finish_reason
            responses.append(
                Response(
                    token_ids=tokens,
                    logprobs=_of_sampled(tokens, completion.logprobs),
                    finished=completion.finish_reason == "stop",
                    version=self._version,
                )
            )
        metrics = [output.metrics for output in outputs]
        use = EngineUse(
            kv_cache_peaks=(watch.peak,),
            busy_seconds=(seconds,),
            preemptions=sum(one.num_preemptions for one in metrics),
            queued_seconds=sum(one.scheduled_ts - one.queued_ts for one in metrics),
            num_responses=len(metrics),
        )
        return responses, use

    def sleep(self) -> None:
        """Frees memory according to ``sleep_level``, until the next `load_weights`."""
        if self._settings.sleep_level and not self._asleep:
            self._llm.sleep(level=self._settings.sleep_level)
            self._asleep = True


class _Watch:
    """Looks at vLLM's gauge of the KV cache and at its counters while a block runs.

    Attributes:
        peak: The largest share of the cache that was seen.
    """

    def __init__(self, llm: Any, progress: SharedProgress) -> None:
        self._llm = llm
        self._progress = progress
        self.peak = 0.0
        self._before = self._counted()
        self.peak = 0.0  # the gauge still had the share of the generation before
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._is_over.wait(_SECONDS_BETWEEN_LOOKS):
            self._look()

    def _look(self) -> None:
        now, before = self._counted(), self._before
        responses, tokens = now.responses - before.responses, now.tokens - before.tokens
        self._progress.set(Progress(responses=responses, tokens=tokens))

    def _counted(self) -> Progress:
        """All that vLLM has generated until now; also keeps the cache's peak."""
        counters = dict.fromkeys((_RESPONSES, _TOKENS), 0)
        for metric in self._llm.get_metrics():
            # The gauge has the share of vLLM's last pass; vLLM keeps no maximum.
            if metric.name == _CACHE:
                self.peak = max(self.peak, metric.value)
            elif metric.name in counters:
                counters[metric.name] += metric.value  # of responses one for each way to end
        return Progress(responses=counters[_RESPONSES], tokens=counters[_TOKENS])


def _of_sampled(tokens: Sequence[int], logprobs: Any) -> tuple[float, ...] | None:
    if logprobs is None:
        return None
    return tuple(of[token].logprob for token, of in zip(tokens, logprobs, strict=True))


def serve(connection: Connection, progress: SharedProgress) -> None:
    """Answers calls (method, arguments) with (True, result), until the other end closes.

    Exceptions are answered with (False, traceback).
    """
    engine: Engine | None = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            if method == "build":
                engine = Engine(*arguments, progress=progress)
                answer: Any = (True, None)
            else:
                answer = (True, getattr(engine, method)(*arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        try:
            connection.send(answer)
        except BrokenPipeError:
            return


def main() -> None:
    """Serves on the pipe whose file descriptor is the first argument."""
    # The kernel kills this process when the trainer ends, however it ends.
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    serve(Connection(int(sys.argv[1])), SharedProgress(int(sys.argv[2])))


if __name__ == "__main__":
    main()
