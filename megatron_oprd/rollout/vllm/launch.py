"""A vLLM server that the run starts: start, health checks and end."""

import importlib.metadata
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_oprd.config.engines.vllm import VLLMConfig
from megatron_oprd.errors import UserError
from megatron_oprd.rollout.engine import RolloutEngineError
from megatron_oprd.rollout.vllm import guard as server_guard
from megatron_oprd.rollout.vllm.client import (
    GENERATE,
    ServerClient,
    ServerError,
    check_served,
)
from megatron_oprd.rollout.vllm.engine import environment_without_rank
from megatron_oprd.rollout.vllm.messages import EXTENSION
from megatron_oprd.rollout.vllm.secret import MIDDLEWARE
from megatron_oprd.rollout.vllm.transfers import transfer_config
from megatron_oprd.weights.casting import dtype_name

logger = logging.getLogger(__name__)

_QUOTED_LINES, _QUOTED_BYTES = 20, 8000
_SECONDS_BETWEEN_TRIES = 0.5


class ServerProcess:
    """A vLLM server on a fixed port, kept across restarts.

    The server ends with this process, even if this process is killed. The thread that calls
    `ensure` must live as long as the server, because Linux signals the end of the parent thread.
    """

    def __init__(
        self,
        folder: Path,  # the student's; weights are not read
        *,
        dtype: torch.dtype,  # of weights and activations
        max_model_len: int,  # tokens of the longest prompt with its response
        host: str,
        gpus: Sequence[int] = (),  # as nvidia-smi counts them; empty on a CPU
        log: Path,  # the server's output is appended
        config: VLLMConfig,
    ) -> None:
        """Reserves a free port; `ensure` starts the server.

        Raises OSError if ``host`` is not an address of this machine.
        """
        self._folder = folder
        self._dtype = dtype
        self._max_model_len = max_model_len
        self._host = host
        self._gpus = gpus
        self._log = log
        self._log_start = 0
        self._was_up = False
        self._config = config
        self._guard: subprocess.Popen | None = None
        # Bound but never listened on: keeps the port reserved while no server is running.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._reserved = socket.socket(family)
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind((host, 0))
        self._port = self._reserved.getsockname()[1]
        self._client = ServerClient(self.url)

    @property
    def url(self) -> str:
        """The server's URL, e.g. ``http://127.0.0.1:40000``."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    def ensure(self) -> None:
        """Starts the server, or restarts it if it exited or hangs; returns when it responds.

        Raises RolloutEngineError if it exits during the start, takes too long or serves another
        model.
        """
        if self._was_up:
            trouble = self._trouble()
            if trouble is None:
                return
            logger.warning("the vLLM server at %s is started again: %s", self.url, trouble)
            self._end(signal.SIGINT)
        self.begin()
        self._wait()

    def begin(self) -> None:
        """Starts the server, or restarts it if it exited, without waiting for it."""
        if self._guard is not None:
            if (code := self._guard.poll()) is None:
                return
            logger.warning(
                "the vLLM server at %s is started again: it ended with exit code %d%s",
                *(self.url, code, self._said()),
            )
            self._end(signal.SIGINT)
        self._start()

    def close(self) -> None:
        """Ends the server, after a few seconds' grace. A second call does nothing."""
        self._end()
        self._reserved.close()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self._guard = subprocess.Popen(
                # -I: modules next to the file must not shadow the standard library's.
                [sys.executable, "-I", server_guard.__file__, str(os.getpid()), *self._command()],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Signals to the run's process group must not reach the server: the guard ends it.
                start_new_session=True,
            )

    def _wait(self) -> None:
        assert self._guard is not None
        minutes = self._config.timeout_minutes
        end = time.monotonic() + minutes * 60
        while True:
            if (code := self._guard.poll()) is not None:
                raise RolloutEngineError(
                    f"the vLLM server ended with exit code {code} while it started{self._said()}"
                )
            try:
                # Cheap; the workers are asked only once the front end responds.
                self._client.call("/health")
                found = self._client.workers("oprd_describe")
            except ServerError as error:
                if time.monotonic() > end:
                    self._end(signal.SIGINT)
                    raise RolloutEngineError(
                        f"{error}, {minutes:.3g} minutes after its start "
                        f"(rollout.vllm.timeout_minutes){self._said()}"
                    ) from error
                time.sleep(_SECONDS_BETWEEN_TRIES)
            else:
                break
        try:
            check_served(
                found,
                self._folder,
                dtype=self._dtype,
                max_model_len=self._max_model_len,
                at="rollout.vllm.start_servers: the server's",
            )
        except UserError as error:
            raise RolloutEngineError(f"{error}{self._said()}") from error
        self._was_up = True

    def _trouble(self) -> str | None:
        """Describes what is wrong with the started server; None if it works."""
        assert self._guard is not None
        if (code := self._guard.poll()) is not None:
            return f"it ended with exit code {code}{self._said()}"
        try:
            # Not /health: the front end can respond while the workers hang.
            self._client.workers("oprd_describe", seconds=self._config.sync_timeout_minutes * 60)
        except ServerError as error:
            return f"{error}{self._said()}"
        return None

    def _end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends the server: SIGTERM allows a few seconds, SIGINT none (see guard.py)."""
        if self._guard is not None:
            self._guard.send_signal(how)
            self._guard.wait()
            self._guard = None
        self._was_up = False

    def _said(self) -> str:
        """The end of the server's output since its start, for an error message."""
        with self._log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _QUOTED_BYTES))
            lines = log.read().decode(errors="replace").splitlines()[-_QUOTED_LINES:]
        return "\n".join((f"; the end of {self._log}:", *lines))

    def _command(self) -> list[str]:
        config = self._config
        options: dict[str, object] = {
            "--host": self._host,
            "--port": self._port,
            "--worker-extension-cls": EXTENSION,
            "--weight-transfer-config": transfer_config(bool(self._gpus)),
            "--dtype": dtype_name(self._dtype),
            "--max-model-len": self._max_model_len,
            "--tensor-parallel-size": config.tensor_model_parallel_size,
            "--gpu-memory-utilization": config.gpu_memory_utilization,
            "--load-format": "dummy",  # the first sync sends all weights
            "--middleware": MIDDLEWARE,
            "--generation-config": "vllm",  # vLLM's defaults, not the model folder's
            "--disable-access-log-for-endpoints": f"/health,{GENERATE}",
        }
        if config.kv_cache_gb is not None:
            options["--kv-cache-memory-bytes"] = round(config.kv_cache_gb * 1e9)
        if config.quantization is not None:
            options["--quantization"] = config.quantization
        flags = ["--enable-scale-out", "--skip-tokenizer-init"]
        if config.enforce_eager:
            flags.append("--enforce-eager")
        return [
            *serve_command(self._folder),
            *flags,
            *(str(part) for option in options.items() for part in option),
        ]

    def _environment(self) -> dict[str, str]:
        environment = environment_without_rank() | {
            "VLLM_SERVER_DEV_MODE": "1",
            # The trainer needs the cores, too.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENGINE_READY_TIMEOUT_S": str(max(1, round(self._config.timeout_minutes * 60))),
        }
        if self._gpus:
            environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # nvidia-smi's order
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self._gpus))
        return environment


def serve_command(folder: Path) -> list[str]:
    """The command ``vllm serve`` of this environment's vLLM."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # The vllm command queries the version of package `vllm`; the CPU build's package has
        # another name.
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
