"""The part of vLLM that `engine_main` calls, without a model, and failing on demand.

Tokens are drawn from the weights and the seed, so that the same of both give the same response.

``FAKE_VLLM_FAULTS`` names a folder with an empty file for every fault, PROCESS.METHOD.CALL.KIND:
the engine that was started as the PROCESS-th in this folder fails in the CALL-th call of METHOD
(``build``, ``weights``, ``generate``, or ``response``, after each); KIND is ``kill``, ``hang``, or
``wait``, which ends when there is a file ``updating``.
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

import torch
from torch import Tensor, nn

from vllm.distributed.weight_transfer import WeightTransferEngineFactory


class SamplingParams(SimpleNamespace):
    """Has every argument as an attribute."""


class LLM:
    """Remembers a number for each of its weights, until others come. Its workers are threads."""

    def __init__(
        self,
        folder: str,
        *,
        worker_extension_cls: str,
        tensor_parallel_size: int,
        weight_transfer_config: dict[str, str],
        **options: Any,
    ) -> None:
        extension = pkgutil.resolve_name(worker_extension_cls)
        self._faults = Path(os.environ["FAKE_VLLM_FAULTS"])
        self._number = _next_number(self._faults)
        self.folder = self._faults / f"process_{self._number}"
        self._calls: Counter[str] = Counter()
        self._tokens = 0
        self._weights: dict[str, float] = {}
        self._workers = [
            _worker(extension, self, number, weight_transfer_config["backend"])
            for number in range(tensor_parallel_size)
        ]
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

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        with ThreadPoolExecutor(len(self._workers)) as pool:
            calls = [pool.submit(getattr(worker, method), *args) for worker in self._workers]
            return [call.result() for call in calls]

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        self.collective_rpc("init_weight_transfer_engine", (request["init_info"],))

    def start_weight_update(self) -> None:
        self._num_taken = 0
        self.collective_rpc("start_weight_update")

    def update_weights(self, request: dict[str, Any]) -> None:
        self.collective_rpc("update_weights", (request["update_info"],))

    def finish_weight_update(self) -> None:
        self.collective_rpc("finish_weight_update")

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if self._num_taken == 5:
                self._fail("weights")
            self._num_taken += 1
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
            metrics = SimpleNamespace(num_preemptions=1, queued_ts=2.0, scheduled_ts=2.5)
            outputs.append(SimpleNamespace(outputs=[completion], metrics=metrics))
            self._tokens += len(tokens)
            self._fail("response")
        return outputs

    def get_metrics(self) -> list[Any]:
        found: dict[str, list[float]] = {
            "vllm:kv_cache_usage_perc": [0.25],
            "vllm:request_success": [0, self._calls["response"]],  # stopped, and of full length
            "vllm:generation_tokens": [self._tokens],
        }
        return [
            SimpleNamespace(name=name, value=value) for name, all in found.items() for value in all
        ]


class _Model(nn.Module):
    """Hands the weights to the LLM, if it is the first worker's; the other's count for nothing."""

    def __init__(self, llm: LLM, number: int) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))
        self._take = llm.take if number == 0 else list

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._take(weights)

    def compute_logits(self) -> None:
        pass


def _worker(extension: type, llm: LLM, number: int, backend: str) -> Any:
    """A worker with the extension's methods, and with an engine as vLLM's worker has one."""

    model = _Model(llm, number)
    engine: Any = WeightTransferEngineFactory.create_engine(backend, model)

    class Worker(extension):
        model_runner = SimpleNamespace(get_model=lambda: model)
        device = torch.device("cpu")

        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
            engine.init_transfer_engine(engine.init_info_cls(**init_info))

        def start_weight_update(self) -> None:
            engine.start_weight_update()

        def update_weights(self, update_info: dict[str, Any]) -> None:
            engine.update_weights(update_info)

        def finish_weight_update(self) -> None:
            engine.finish_weight_update()

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
