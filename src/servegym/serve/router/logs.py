"""How the router's log is written: lines for people, or an object a line for machines.

A line that belongs to a request has its id. Keys are never logged; what looks like credentials all
the same, as in another library's error, is blanked out.
"""

from __future__ import annotations

import json
import logging
import re
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from servegym.serve.router.config import LogConfig

if TYPE_CHECKING:
    from servegym.serve.router.client import Request

#: Id of the request that is being answered; each has a task, and so a context, of its own.
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
#: Id of its trace, where there is one.
TRACE_ID: ContextVar[str] = ContextVar("trace_id", default="")
#: Attribute of a record, given as `extra`, with more members of its object.
FIELDS = "servegym_fields"

_log = logging.getLogger(__name__)

_CREDENTIALS = re.compile(r"\b(bearer|basic)(\s+)[^\s\"',;\\]+", re.IGNORECASE)
#: Of messages that a client can make long; what follows is cut off.
_MAX_CHARACTERS = 16_384


def set_up(config: LogConfig) -> None:
    """Write the log of this process to standard error as configured.

    Other libraries are heard from `info` upwards at most: their own debugging shows what they send.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if config.format == "json" else TextLines())
    level = logging.getLevelNamesMapping()[config.level.upper()]
    logging.basicConfig(handlers=[handler], level=max(level, logging.INFO), force=True)
    logging.getLogger("servegym").setLevel(level)


def log_request(request: Request, endpoint: str, status: int, duration_s: float) -> None:
    """Leave a line of an answer to a client.

    Args:
        request: The client's.
        endpoint: Its name, not what the client wrote.
        status: Of the answer; 499 if the client left before its end.
        duration_s: From the end of the request's head to the end of the answer.
    """
    fields: dict[str, object] = {
        "method": request.head.method,
        "endpoint": endpoint,
        "status": status,
        "duration_s": round(duration_s, 6),
    }
    if request.tenant:
        fields["tenant"] = request.tenant
    if request.replica:
        fields["replica"] = request.replica
    said = " ".join(f"{name}={value}" for name, value in fields.items())
    _log.info("answered %s", said, extra={FIELDS: fields})


def _bare(text: str) -> str:
    return _CREDENTIALS.sub(r"\1\2***", text[:_MAX_CHARACTERS])


class TextLines(logging.Formatter):
    """Lines for people: time, level, the request's id if there is one, message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - as logging names it
        """Put the request's id before the message."""
        key = REQUEST_ID.get()
        record.message = f"[{key}] {record.message}" if key else record.message
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """Write a record; one that has a traceback takes several lines."""
        return _bare(super().format(record))


class JsonLines(logging.Formatter):
    """An object a line: `time` (RFC 3339, UTC), `level`, `logger`, `process`, `message`, ...

    ... `request_id` and `trace_id` where there is one, `error` with `type` and `traceback` where
    something was raised, and what the line is about.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": _bare(record.getMessage()),
        }
        if key := REQUEST_ID.get():
            line["request_id"] = key
        if trace := TRACE_ID.get():
            line["trace_id"] = trace
        line |= getattr(record, FIELDS, {})
        if record.exc_info and record.exc_info[0] is not None:
            traceback = _bare(self.formatException(record.exc_info))
            line["error"] = {"type": record.exc_info[0].__name__, "traceback": traceback}
        return json.dumps(line, default=str)  # ASCII: whatever a client has sent can be written
