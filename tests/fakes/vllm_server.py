"""A vLLM server without a model: answers over HTTP, and takes weights as its workers do."""

import functools
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from megatron_oprd.rollout.vllm.messages import EXTENSION
from megatron_oprd.rollout.vllm.sockets import WorkerSocket
from megatron_oprd.rollout.vllm.transfers import TCP
from megatron_oprd.weights.checksum import checksum


class FakeServer:
    """Listens on a free port, or on the given one.

    Attributes:
        config: The served model's, as JSON.
        described: What its worker says of itself besides.
        num_workers: How many workers it says that it has.
        extension: Its --worker-extension-cls.
        label: Version of its weights.
        weights: What it was sent, and has not lost.
        masked: The ids that it never samples.
        tied: Whether it was told that the LM head is the embedding.
        instead: Path -> in place of answering: returns (status, body), or None to answer.
        num_syncs: How many updates came to their end.
        num_connections: How often its worker was connected with a trainer.
        is_updating: Whether it waits for weights.
        pauses, resumes: How often it was asked to.
        finish_reason: Of its responses.
        num_responses: How many it has given since its start, each with one preemption.
        spans: Versions of a response's tokens, if it is not the label alone.
        secret: Which requests have to know, if set.
    """

    def __init__(
        self, config: dict[str, Any], *, address: tuple[str, int] = ("127.0.0.1", 0)
    ) -> None:
        self.config = config
        self.described = {
            "dtype": "float32",
            "max_model_len": 256,
            "logprobs_mode": "raw_logprobs",
            "quantization": None,
            "weight_transfer": TCP,
        }
        self.num_workers = 1
        self.extension = EXTENSION
        self.label = "default"
        self.weights: dict[str, Tensor] = {}
        self.masked: list[int] = []
        self.tied = False
        self.instead: dict[str, Callable[[], tuple[int, bytes] | None]] = {}
        self.num_syncs = self.num_connections = 0
        self.is_updating = False
        self._digests: dict[str, str] = {}
        self._trainer: WorkerSocket | None = None
        self.pauses = self.resumes = 0
        self._gate = threading.Condition()
        self.finish_reason = "length"
        self.secret: str | None = None
        self.spans: list[str] = []
        self.num_responses = self.num_running = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: Any) -> None:
                path = self.path.partition("?")[0]
                other = server.instead[path]() if path in server.instead else None
                given = self.headers.get("Authorization")
                if server.secret is not None and given != f"Bearer {server.secret}":
                    other = 401, b"wrong or no secret"
                try:
                    status, data = other or (200, server.answer_as_text(path, body).encode())
                except (OSError, RuntimeError) as error:
                    status, data = 500, str(error).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # connections at the same time, as uvicorn has more

        self._http = Server(address, Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        # The interval bounds how long `close` takes.
        serve = functools.partial(self._http.serve_forever, poll_interval=0.02)
        threading.Thread(target=serve, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer_as_text(self, path: str, body: Any) -> str:
        return self.metrics() if path == "/metrics" else json.dumps(self.answer(path, body))

    def metrics(self) -> str:
        """What vLLM says to Prometheus, of the lines that are read and of one more."""
        values = {
            "kv_cache_usage_perc": 0.25,
            "num_requests_running": self.num_running,
            "num_requests_waiting": 0,
            "num_preemptions_total": self.num_responses,
            "request_queue_time_seconds_sum": 0.5 * self.num_responses,
            "request_queue_time_seconds_count": self.num_responses,
            "prompt_tokens_total": 7,
        }
        lines = [f'vllm:{name}{{engine="0",model_name="a"}} {x}' for name, x in values.items()]
        return "\n".join(["# HELP vllm:num_requests_running Number.", *lines, ""])

    def answer(self, path: str, body: Any) -> Any:
        if path == "/server_info":
            return {"vllm_config": {"parallel_config": {"worker_extension_cls": self.extension}}}
        if path == "/weight_info":
            return {"weight_version": self.label}
        if path == "/update_weight_version":
            self.label = body["new_version"]
        elif path == "/pause":
            with self._gate:
                self.pauses += 1
        elif path == "/resume":
            with self._gate:
                self.resumes += 1
                self._gate.notify_all()
        elif path == "/init_weight_transfer_engine":
            self._trainer = WorkerSocket(**body["init_info"])
            self.num_connections += 1
        elif path == "/shutdown_weight_transfer_engine":
            self._disconnect()
        elif path == "/start_weight_update":
            self.start()
        elif path == "/update_weights":
            self._update(**body["update_info"])
        elif path == "/finish_weight_update":
            self._finish(body.get("weight_version"))
        elif path == "/collective_rpc":
            return {"results": [getattr(self, body["method"])(*body["args"])] * self.num_workers}
        elif path == "/inference/v1/generate":
            return {"choices": [self._choice(body)]}
        return {"success": True}

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = body["sampling_params"].get("logprobs")
        with self._gate:
            self.num_running += 1
        tokens = self.tokens(body)
        with self._gate:
            self._gate.wait_for(lambda: self.pauses <= self.resumes)
            label = self.label
            self.num_running -= 1
            self.num_responses += 1
        return {
            "token_ids": tokens,
            "finish_reason": self.finish_reason,
            "logprobs": None if asked is None else {"content": [{"logprob": -0.5}] * len(tokens)},
            "weight_versions": [{"version": one} for one in self.spans or [label]],
        }

    def tokens(self, body: dict[str, Any]) -> list[int]:
        """The response to a request."""
        return [(body["sampling_params"].get("seed", 0) + i) % 90 for i in range(3)]

    def start(self) -> None:
        """Waits for weights, as vLLM only if it does not wait already."""
        if self.is_updating:
            raise RuntimeError("an update is active")
        self.is_updating = True

    def load(self, weights: dict[str, Tensor]) -> None:
        """Called with the weights of a chunk."""

    def _update(self, names: list[str], dtype_names: list[str], shapes: list[list[int]]) -> None:
        if not self.is_updating or self._trainer is None:
            raise RuntimeError("no update is active")
        try:
            chunk = {
                name: self._trainer.receive(shape, getattr(torch, dtype))
                for name, dtype, shape in zip(names, dtype_names, shapes, strict=True)
            }
        except OSError:
            self.is_updating = False
            raise
        self.weights |= chunk
        self._digests |= {name: checksum(tensor) for name, tensor in chunk.items()}
        self.load(chunk)

    def _finish(self, version: str | None) -> None:
        if not self.is_updating:
            raise RuntimeError("no update is active")
        self.is_updating = False
        if version is not None:
            self.label = version
            self.num_syncs += 1

    def _disconnect(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None

    def start_again(self) -> None:
        """Has nobody's weights any more, as after another start."""
        self.label, self.masked, self.weights = "default", [], {}
        self.is_updating = False
        self.num_responses = 0
        self._disconnect()

    def oprd_describe(self) -> dict[str, Any]:
        return {"config": self.config, **self.described}

    def oprd_prepare(self, never: list[int], tied: bool, keep_digests: bool) -> None:
        self.masked, self.tied, self._digests = never, tied, {}

    def oprd_digests(self) -> dict[str, str]:
        return self._digests
