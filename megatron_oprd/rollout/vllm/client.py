"""HTTP client of a vLLM server, and checks that a run can use the server."""

import http.client
import importlib.util
import json
import os
import shlex
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoConfig

from megatron_oprd.errors import UserError
from megatron_oprd.rollout.engine import RolloutEngineError
from megatron_oprd.rollout.vllm.messages import EXTENSION
from megatron_oprd.rollout.vllm.secret import VARIABLE
from megatron_oprd.rollout.vllm.transfers import NCCL, TCP, transfer_config
from megatron_oprd.weights.casting import dtype_name

GENERATE = "/inference/v1/generate"
# Fields that must be equal in the server's and the student's config, if both have them.
_SAME = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    *("rope_type", "rope_theta", "partial_rotary_factor", "factor"),
    *("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    *("short_factor", "long_factor", "attention_factor", "mscale", "mscale_all_dim"),
    *("beta_fast", "beta_slow", "truncate", "no_rope_layers"),
    *("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
)
_SECONDS_TO_ANSWER = 30
_SECONDS_FOR_INFO = 300  # vLLM collects information on the whole machine
_SECONDS_BETWEEN_TRIES = 2


class ServerError(RolloutEngineError):
    """A server does not respond, or responds with an error."""


class ServerClient:
    """HTTP client of one server, e.g. ``http://host:8000``. Thread-safe."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # No proxy: the environment's proxy is not for servers of the same cluster.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return str(parts.hostname), parts.port or 80

    def call(self, path: str, body: Any = None, *, seconds: float = _SECONDS_TO_ANSWER) -> Any:
        """POSTs ``body`` as JSON, or GETs without a body; returns the response's JSON or None.

        Raises ServerError on an error response, or if none comes within ``seconds``.
        """
        text = self.text(path, body, seconds=seconds)
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise ServerError(
                f"the vLLM server at {self.url} answers {path} with what is no JSON: {error}"
            ) from error

    def text(self, path: str, body: Any = None, *, seconds: float) -> str:
        """The response's text; arguments and errors as in `call`."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if secret := os.environ.get(VARIABLE):
            headers["Authorization"] = f"Bearer {secret}"
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=seconds) as response:
                return response.read().decode()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:2000]
            raise ServerError(
                f"the vLLM server at {self.url} answers {path} with {error.code}: {said}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            # URLError and timeouts are OSErrors.
            raise ServerError(
                f"the vLLM server at {self.url} does not answer {path}: {error}"
            ) from error
        except UnicodeDecodeError as error:
            raise ServerError(
                f"the vLLM server at {self.url} answers {path} with what is no text: {error}"
            ) from error

    def workers(
        self, method: str, *arguments: Any, seconds: float = _SECONDS_TO_ANSWER
    ) -> list[Any]:
        """Calls a method of `WeightReceiver` on every worker; errors as in `call`."""
        body = {"method": method, "args": list(arguments)}
        answer = self.call("/collective_rpc", body, seconds=seconds)
        return answer["results"]

    def wait(self, seconds: float) -> None:
        """Waits until the server responds; raises ServerError after ``seconds``."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.call("/health")
            except ServerError:
                if time.monotonic() > end:
                    raise
            else:
                return
            time.sleep(_SECONDS_BETWEEN_TRIES)


def check_server(url: str, folder: Path, *, dtype: torch.dtype, max_model_len: int) -> None:
    """Checks that a server can produce the student's rollouts.

    Raises UserError if it does not respond, lacks required options or serves another model.
    """
    found = _describe(url, folder)
    at = f"rollout.vllm.servers: {url}: the server's"
    name = dtype_name(dtype)
    again = "; start it as " + _command(
        folder, f"--dtype {name}", f"--max-model-len {max_model_len}"
    )
    try:
        check_served(found, folder, dtype=dtype, max_model_len=max_model_len, at=at)
    except UserError as error:
        raise UserError(f"{error}{again}") from error


def check_served(
    found: list[dict[str, Any]], folder: Path, *, dtype: torch.dtype, max_model_len: int, at: str
) -> None:
    """Checks the served model and settings in the workers' descriptions (`oprd_describe`).

    Raises UserError, starting with ``at``, if they do not fit the student, ``model.params_dtype``
    or ``max_model_len`` (tokens of the longest prompt with its response).
    """
    own = AutoConfig.from_pretrained(folder, local_files_only=True)
    # Rope parameters are nested in transformers 5's config; flattened, they compare by name.
    served, ours = (
        config | (config.get("rope_parameters") or {})
        for config in (found[0]["config"], json.loads(own.to_json_string(use_diff=False)))
    )
    if served["vocab_size"] != ours["vocab_size"]:
        raise UserError(
            f"{at} model has a vocabulary of {served['vocab_size']}, model.student ({folder}) of "
            f"{ours['vocab_size']}"
        )
    for key in _SAME:
        if key in served and key in ours and served[key] != ours[key]:
            name, theirs, expected = _first_difference(key, served[key], ours[key])
            raise UserError(
                f"{at} model has {name} = {theirs}, model.student ({folder}) has {expected}"
            )
    name = dtype_name(dtype)
    if found[0]["dtype"] != name:
        raise UserError(f"{at} dtype is {found[0]['dtype']}, model.params_dtype means {name}")
    if found[0]["max_model_len"] < max_model_len:
        raise UserError(
            f"{at} max_model_len is {found[0]['max_model_len']}, the longest prompt with its "
            f"response has {max_model_len} tokens"
        )
    if not found[0]["logprobs_mode"].endswith("raw_logprobs"):
        raise UserError(
            f"{at} logprobs_mode is {found[0]['logprobs_mode']}: leave --logprobs-mode at "
            "raw_logprobs"
        )


def _first_difference(key: str, one: Any, other: Any) -> tuple[str, Any, Any]:
    """Locates the first difference of two config values: name and both values."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        index = next(i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        return f"{key}[{index}]", one[index], other[index]
    return key, one, other


def _describe(url: str, folder: Path) -> list[dict[str, Any]]:
    """Checks the server's options one by one; returns its workers' descriptions."""
    client = ServerClient(url)
    setting = f"rollout.vllm.servers: {url}"
    start = _command(folder)
    try:
        client.call("/health")
    except ServerError as error:
        raise UserError(f"{setting}: {error}. Start it first: {start}") from error
    try:
        # The endpoint exists only with VLLM_SERVER_DEV_MODE=1, as do the endpoints of the weight
        # sync.
        info = client.call("/server_info?config_format=json", seconds=_SECONDS_FOR_INFO)
    except ServerError as error:
        raise UserError(
            f"{setting}: the server takes no weights; start it with VLLM_SERVER_DEV_MODE=1 in its "
            f"environment, on a network that only you reach: {start} ({error})"
        ) from error
    if (found := info["vllm_config"]["parallel_config"]["worker_extension_cls"]) != EXTENSION:
        raise UserError(
            f"{setting}: the server's --worker-extension-cls is {found!r}; install this package "
            f"beside vLLM (pip install megatron-oprd), and start it as {start}"
        )
    try:
        # The endpoint exists only with --enable-scale-out.
        client.call(GENERATE, {"token_ids": [0], "sampling_params": {"max_tokens": 1}})
    except ServerError as error:
        raise UserError(
            f"{setting}: the server takes no token ids; start it as {start} ({error})"
        ) from error
    found = client.workers("oprd_describe")
    _check_transfer(found[0]["weight_transfer"], setting=setting, start=start)
    return found


def _check_transfer(backend: str | None, *, setting: str, start: str) -> None:
    """Checks that this process can send weights to a server of the backend (`transfers`)."""
    if backend not in (NCCL, TCP):
        raise UserError(
            f"{setting}: the server's --weight-transfer-config has the backend {backend!r}; right "
            f"are {NCCL!r} for GPUs and {TCP!r} for weights through host memory: {start}"
        )
    if backend != NCCL:
        return
    if not torch.cuda.is_available():
        raise UserError(
            f"{setting}: the server's weight transfer is {NCCL!r}, and this trainer has no GPU; "
            f"start the server with {TCP!r}"
        )
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"{setting}: the server's weight transfer is {NCCL!r}, for which the trainer needs "
            f"vLLM, too (pip install 'megatron-oprd[vllm]'); or start the server with {TCP!r}"
        )


def _command(folder: Path, *options: str) -> str:
    return " ".join(
        (
            f"VLLM_SERVER_DEV_MODE=1 vllm serve {folder} --enable-scale-out",
            f"--worker-extension-cls {EXTENSION}",
            f"--weight-transfer-config {shlex.quote(transfer_config(torch.cuda.is_available()))}",
            *options,
        )
    )
