"""A server that asks for a secret, as vLLM would run its middleware."""

import asyncio
from typing import Any

import pytest

from megatron_oprd.rollout.vllm.client import ServerClient, ServerError
from megatron_oprd.rollout.vllm.secret import VARIABLE, RequireSecret
from tests.fakes.vllm_server import FakeServer


def status(app: RequireSecret, path: str, headers: dict[bytes, bytes]) -> int:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": list(headers.items())}
    asyncio.run(app(scope, None, send))
    return sent[0]["status"]


async def served(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200})


def test_every_path_but_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "s3cret")
    app = RequireSecret(served)
    right = {b"authorization": b"Bearer s3cret"}
    for path in ("/update_weights", "/collective_rpc", "/inference/v1/generate", "/v1/models"):
        assert status(app, path, right) == 200
        assert status(app, path, {}) == 401
        assert status(app, path, {b"authorization": b"Bearer s3cre"}) == 401
    assert status(app, "/health", {}) == 200


def test_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match=f"{VARIABLE} is not set"):
        RequireSecret(served)


def test_the_client_sends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer({})
    server.secret = "s3cret"
    client = ServerClient(server.url)
    with pytest.raises(ServerError, match="answers /weight_info with 401"):
        client.call("/weight_info")
    monkeypatch.setenv(VARIABLE, "s3cret")
    assert client.call("/weight_info") == {"weight_version": "default"}
    server.close()
