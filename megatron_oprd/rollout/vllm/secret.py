"""A secret that a vLLM server asks of every request: ASGI middleware for ``vllm serve``.

MEGATRON_OPRD_SERVER_SECRET=... vllm serve DIR \
    --middleware megatron_oprd.rollout.vllm.secret.RequireSecret

vLLM's own ``--api-key`` guards paths under /v1 only, not those that change weights.
"""

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

VARIABLE = "MEGATRON_OPRD_SERVER_SECRET"
MIDDLEWARE = "megatron_oprd.rollout.vllm.secret.RequireSecret"
# Says only whether the server is up.
_OPEN = "/health"


class RequireSecret:
    """Answers 401 to requests without ``Authorization: Bearer SECRET``; /health is open."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        """Reads the secret from the environment; raises RuntimeError without one."""
        self._app = app
        secret = os.environ.get(VARIABLE)
        if not secret:
            raise RuntimeError(f"{VARIABLE} is not set, which {MIDDLEWARE} needs")
        self._expected = f"Bearer {secret}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles an ASGI request."""
        if scope["type"] in ("http", "websocket") and scope["path"] != _OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                if scope["type"] == "http":
                    headers = [(b"content-type", b"text/plain")]
                    start = {"type": "http.response.start", "status": 401, "headers": headers}
                    await send(start)
                    await send({"type": "http.response.body", "body": b"wrong or no secret"})
                else:
                    await send({"type": "websocket.close", "code": 1008})
                return
        await self._app(scope, receive, send)
