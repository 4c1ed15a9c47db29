"""Reading what a gateway shows of a request, its headers and perhaps its body."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np

from servegym.serve.picker.config import PickRequestConfig
from servegym.serve.requests.prompt import Prompt, PromptReader, Size
from servegym.serve.router.disaggregation import is_divisible
from servegym.serve.router.forms import Form
from servegym.serve.router.placement import Arrival
from servegym.serve.router.request import read_request

_EVERYONE = "default"
#: Larger bodies are read in a thread.
_LARGE_BYTES = 64 * 1024


class Reading:
    """Makes arrivals of what gateways show.

    Args:
        config: What is read.
        reader: Measures prompts.
        bytes_per_token: Of bodies that are not seen.
        clock: Seconds that never go back.

    Attributes:
        config: As given.
    """

    def __init__(
        self,
        config: PickRequestConfig,
        reader: PromptReader,
        bytes_per_token: float,
        clock: Callable[[], float],
    ) -> None:
        self.config = config
        self._reader = reader
        self._bytes_per_token = bytes_per_token
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "large-bodies")

    def close(self) -> None:
        """End the thread for large bodies."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def names(self, fields: Mapping[str, str]) -> tuple[str, str]:
        """Return the tenant and the key of a request.

        Args:
            fields: Its headers, by name in lower case.
        """
        tenant = fields.get(self.config.tenant_header) or _EVERYONE
        return tenant, fields.get("x-request-id") or str(uuid.uuid4())

    async def read(
        self, form: Form, fields: Mapping[str, str], body: bytes | None, *, streams: bool
    ) -> Arrival:
        """Read a request as far as it is there; without its body the headers tell its length.

        Args:
            form: By which the body is read.
            fields: Its headers, by name in lower case.
            body: All of it; `None` if the gateway does not send it, or there is none.
            streams: Whether tokens are seen where it asks for a stream.

        Raises:
            RequestError: If it cannot be read.
        """
        arrival = await self._read(form, fields, body, self._clock())
        config = self.config
        session = fields.get(config.session_header) if config.session_header else None
        return arrival._replace(
            stream=arrival.stream and streams,
            slo_class=fields.get(config.slo_header) or arrival.slo_class,
            session=session or arrival.session,
        )

    async def _read(
        self, form: Form, fields: Mapping[str, str], body: bytes | None, read_s: float
    ) -> Arrival:
        if body is None or fields.get("content-encoding", "identity") != "identity":
            length = fields.get("content-length", "")
            num_bytes = len(body) if body else int(length) if length.isdecimal() else 0
            tokens = max(1.0, num_bytes / self._bytes_per_token)
            nothing = Prompt(tokens, np.empty(0, np.uint64), 1.0)
            return Arrival(nothing, "", None, True, None, None, read_s)
        kind = fields.get("content-type", "")
        if len(body) < _LARGE_BYTES:
            return self._read_body(form, body, kind, read_s)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._read_body, form, body, kind, read_s)

    def _read_body(self, form: Form, body: bytes, content_type: str, read_s: float) -> Arrival:
        asked = read_request(
            body,
            form,
            content_type=content_type,
            slo_field=self.config.slo_field,
            session_field=self.config.session_field,
        )
        prompt = asked.prompt
        if not isinstance(prompt, Prompt):
            prompt = self._reader.read(cast("str | Sequence[int] | Size", prompt))
        return Arrival(
            prompt,
            asked.model,
            asked.max_tokens,
            asked.stream,
            asked.slo_class,
            asked.session,
            read_s,
            divisible=is_divisible(form, asked.fields),
        )
