"""Forms with a file (RFC 7578), as far as a router reads them: the fields, and how large files are.

The body reaches the replica as it came.
"""

from __future__ import annotations

import re
from email.message import Message

from servegym.serve.router.errors import RequestError

_NAME = re.compile(rb'(?i)\bname="([^"]*)"')
_FILE = re.compile(rb"(?i)\bfilename\*?=")
#: Fields are short; what is longer is none that a router reads.
_MAX_FIELD_BYTES = 8192
_MAX_PARTS = 1000


def read_form(body: bytes, content_type: str) -> dict[str, object]:
    """Return the fields of a form: texts, and of files the number of their bytes.

    Raises:
        RequestError: If it is no such form.
    """
    head = Message()
    head["content-type"] = content_type
    boundary = head.get_param("boundary")
    if head.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
        raise RequestError(
            415, "the body must be multipart/form-data, with a boundary", "unsupported_media_type"
        )
    delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
    _, *parts = (b"\r\n" + body).split(delimiter, _MAX_PARTS)
    if not parts or not parts[-1].startswith(b"--"):
        raise RequestError(400, "the form does not end as its boundary says", "invalid_body")
    fields: dict[str, object] = {}
    for part in parts[:-1]:
        headers, _, content = part.partition(b"\r\n\r\n")
        name = _NAME.search(headers)
        if name is None:
            continue
        key = name[1].decode("utf-8", "replace")
        if _FILE.search(headers):
            fields[key] = len(content)
        elif len(content) <= _MAX_FIELD_BYTES:
            fields[key] = content.decode("utf-8", "replace")
    return fields
