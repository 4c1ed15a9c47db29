"""An answer of the router's own, whole."""

from __future__ import annotations

import json
from dataclasses import dataclass, field


@dataclass(slots=True)
class Reply:
    """What a client is told in one piece.

    Attributes:
        status: HTTP status.
        body: As bytes.
        headers: Beside those of the connection; `Content-Type` among them.
    """

    status: int
    body: bytes
    headers: list[tuple[str, str]] = field(default_factory=list)


def json_reply(document: object, status: int = 200) -> Reply:
    """Make a document a reply."""
    headers = [("Content-Type", "application/json; charset=utf-8")]
    return Reply(status, json.dumps(document).encode(), headers)
