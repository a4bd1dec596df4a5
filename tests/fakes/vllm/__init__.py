"""The part of vLLM that `engine_main` calls, without a model, and failing on demand.

Tokens are drawn from the weights and the seed, so that the same of both give the same response.

``FAKE_VLLM_FAULTS`` names a folder with an empty file for every fault, PROCESS.METHOD.CALL.KIND:
the engine that was started as the PROCESS-th in this folder fails in the CALL-th call of METHOD
(``build``, ``weights`` or ``generate``); KIND is ``kill``, ``hang``, or ``wait``, which ends when
there is a file ``updating``.
"""

import os
import pkgutil
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor


class SamplingParams(SimpleNamespace):
    """Has every argument as an attribute."""


class LLM:
    """Remembers a number for each of its weights, until others come. Its workers are threads."""

    def __init__(
        self, folder: str, *, worker_extension_cls: str, tensor_parallel_size: int, **options: Any
    ) -> None:
        extension = pkgutil.resolve_name(worker_extension_cls)
        self._workers = [
            _worker(extension, self if number == 0 else None)
            for number in range(tensor_parallel_size)
        ]
        self._faults = Path(os.environ["FAKE_VLLM_FAULTS"])
        self._number = _next_number(self._faults)
        self.folder = self._faults / f"process_{self._number}"
        self._calls: Counter[str] = Counter()
        self._weights: dict[str, float] = {}
        self._fail("build")

    def _fail(self, method: str) -> None:
        self._calls[method] += 1
        name = self._faults / f"{self._number}.{method}.{self._calls[method]}"
        if name.with_name(f"{name.name}.kill").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if name.with_name(f"{name.name}.hang").exists():
            time.sleep(3600)
        if name.with_name(f"{name.name}.wait").exists():
            while not (self._faults / "updating").exists():
                time.sleep(0.01)

    def reset_prefix_cache(self) -> bool:
        return True

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        with ThreadPoolExecutor(len(self._workers)) as pool:
            calls = [pool.submit(getattr(worker, method), *args) for worker in self._workers]
            return [call.result() for call in calls]

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for number, (name, tensor) in enumerate(weights):
            if number == 5:
                self._fail("weights")
            self._weights[name] = float(tensor.double().sum())

    def generate(
        self, prompts: list[dict[str, Any]], params: list[Any], use_tqdm: bool
    ) -> list[Any]:
        self._fail("generate")
        weights = sum(i * self._weights[name] for i, name in enumerate(sorted(self._weights)))
        outputs = []
        for prompt, of in zip(prompts, params, strict=True):
            draw = random.Random(f"{weights!r} {of.seed} {prompt['prompt_token_ids']}")
            tokens = [draw.randrange(5, 97) for _ in range(of.max_tokens)]
            logprobs = None
            if of.logprobs is not None:
                logprobs = [{token: SimpleNamespace(logprob=-1.0)} for token in tokens]
            completion = SimpleNamespace(
                token_ids=tokens, logprobs=logprobs, finish_reason="length"
            )
            outputs.append(SimpleNamespace(outputs=[completion]))
        return outputs


def _worker(extension: type, llm: LLM | None) -> Any:
    """A worker with the extension's methods; one has the weights counted, the others none."""

    class Worker(extension):
        def oprd_mask(self, ids: list[int]) -> None:
            pass

        def reload_weights(
            self, weights_iterator: Iterable[tuple[str, Tensor]], is_checkpoint_format: bool
        ) -> None:
            assert is_checkpoint_format
            if llm is None:
                list(weights_iterator)
            else:
                llm.take(weights_iterator)

    return Worker()


def _next_number(folder: Path) -> int:
    number = 1
    while True:
        try:
            (folder / f"process_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return number
