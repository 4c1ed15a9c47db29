"""Errors as OpenAI's clients know them."""

from __future__ import annotations

import json
import math

from aiohttp import web


class RequestError(Exception):
    """Raised to answer a client with an error.

    Args:
        status: HTTP status.
        message: One sentence.
        code: Machine-readable, as OpenAI's where it has one.
        retry_after_s: When to come again, if that helps.
    """

    def __init__(
        self, status: int, message: str, code: str, *, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.retry_after_s = retry_after_s

    def response(self) -> web.Response:
        """Make it a response."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return web.Response(
            body=error_body(self.status, self.message, self.code),
            status=self.status,
            headers=headers,
            content_type="application/json",
        )


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, code: str) -> bytes:
    """Write an OpenAI-style error object."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error}).encode()
