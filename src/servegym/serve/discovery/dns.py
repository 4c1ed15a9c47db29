"""Replicas behind one name of the DNS, such as that of a headless service.

The system's resolver is asked, as every other program asks it; it does not tell how long an answer
holds, so it is asked at an interval of its own.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator

from servegym.serve.discovery.config import DnsConfig
from servegym.serve.discovery.found import Found, place

_log = logging.getLogger(__name__)


class DnsNames:
    """Looks a name up again and again.

    Args:
        config: Which, and how often.
    """

    def __init__(self, config: DnsConfig) -> None:
        self.config = config
        self.title = f"dns {config.name}"

    async def watch(self) -> AsyncGenerator[list[Found]]:
        """Yield the servers of each answer; a failed look-up says nothing about them."""
        loop, complaint = asyncio.get_running_loop(), ""
        while True:
            try:
                answers = await loop.getaddrinfo(
                    self.config.name, self.config.port, type=socket.SOCK_STREAM
                )
            except OSError as error:
                # a name without addresses and a resolver that is down look alike from here
                if str(error) != complaint:
                    complaint = str(error)
                    _log.error("%s: %s; its replicas stay", self.title, error.strerror or error)
            else:
                complaint = ""
                hosts = sorted({str(address[0]) for *_, address in answers})
                port, scheme = self.config.port, self.config.scheme
                yield [Found(place(host, port), host, port, scheme) for host in hosts]
            await asyncio.sleep(self.config.every_s)
