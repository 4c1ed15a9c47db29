"""What is logged of requests to the operators' port that are not HTTP.

aiohttp logs their bytes, which may hold a key, and a traceback of its own code for each.
"""

from __future__ import annotations

import logging

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError


class _OneLine(logging.Filter):
    """Leaves the kind of an error and where it was raised, never what a client sent."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info or record.exc_info[1] is None:
            return True
        error, trace = record.exc_info[1], record.exc_info[2]
        what = record.getMessage()
        record.exc_info = record.exc_text = None
        if isinstance(error, (HttpProcessingError, RequestPayloadError)):
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.msg, record.args = "%s: not HTTP (%s)", (what, type(error).__name__)
            return True
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = "an unknown place"
        if trace is not None:
            place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        record.msg, record.args = "%s: %s in %s", (what, type(error).__name__, place)
        return True


#: For aiohttp's server.
http_logger = logging.getLogger("servegym.serve.router.http")
http_logger.addFilter(_OneLine())
