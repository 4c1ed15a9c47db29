"""Errors as OpenAI's clients know them."""

from __future__ import annotations

import json
import math

from servegym.serve.router.reply import Reply


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

    def reply(self) -> Reply:
        """Make it a reply."""
        headers = [("Content-Type", "application/json; charset=utf-8")]
        if self.retry_after_s is not None:
            headers.append(("Retry-After", str(max(1, math.ceil(self.retry_after_s)))))
        if self.status == 401:
            headers.append(("WWW-Authenticate", "Bearer"))
        return Reply(self.status, error_body(self.status, self.message, self.code), headers)


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, code: str) -> bytes:
    """Write an OpenAI-style error object."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error}).encode()
