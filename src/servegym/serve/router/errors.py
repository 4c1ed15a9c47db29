"""Errors as the clients of OpenAI's and Anthropic's APIs know them."""

from __future__ import annotations

import json
import math

from servegym.serve.router.reply import Reply
from servegym.serve.router.typed_events import Dialect


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

    def reply(self, dialect: Dialect = "openai") -> Reply:
        """Make it a reply."""
        headers = [("Content-Type", "application/json; charset=utf-8")]
        if self.retry_after_s is not None:
            headers.append(("Retry-After", str(max(1, math.ceil(self.retry_after_s)))))
        if self.status == 401:
            headers.append(("WWW-Authenticate", "Bearer"))
        body = error_body(self.status, self.message, self.code, dialect)
        return Reply(self.status, body, headers)


#: What Anthropic's clients know errors by, where it is another word.
_ANTHROPIC_TYPES = {404: "not_found_error", 413: "request_too_large", 503: "overloaded_error"}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, code: str, dialect: Dialect = "openai") -> bytes:
    """Write an error object, OpenAI's or Anthropic's."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    if dialect == "anthropic":
        kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else kind)
        return json.dumps({"type": "error", "error": {"type": kind, "message": message}}).encode()
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error}).encode()


def error_event(status: int, message: str, code: str, dialect: Dialect) -> bytes:
    """Write an event that says why a stream ends, in the words of the stream."""
    if dialect == "openai":
        return b"data: " + error_body(status, message, code) + b"\n\n"
    body = error_body(status, message, code, dialect)
    if dialect == "responses":
        event = {"type": "error", "code": code, "message": message, "param": None}
        body = json.dumps(event).encode()
    return b"event: error\ndata: " + body + b"\n\n"
