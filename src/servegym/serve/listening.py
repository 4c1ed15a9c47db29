"""Listening on a port, for the router and the emulated engine."""

from __future__ import annotations

import socket

from aiohttp import web

#: Connections that may wait to be taken; a storm of clients needs them.
BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address.

    Args:
        host: Address, of either version of IP.
        port: 0 takes a free one.

    Raises:
        OSError: If the address cannot be had, or `OverflowError` if there is no such port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # by its protocol asyncio knows connections whose small pieces must not wait for each other
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError):
        listener.close()
        raise
    return listener


async def listen(runner: web.AppRunner, host: str, port: int) -> tuple[web.SockSite, int]:
    """Let an application that was set up take connections; see `bind`.

    Args:
        runner: Of the application.
        host: Address.
        port: 0 takes a free one.

    Returns:
        What can be stopped, and the port.
    """
    return await listen_at(runner, bind(host, port))


async def listen_at(runner: web.AppRunner, listener: socket.socket) -> tuple[web.SockSite, int]:
    """Let an application that was set up take connections at a socket that is bound."""
    site = web.SockSite(runner, listener, backlog=BACKLOG)
    await site.start()
    return site, int(listener.getsockname()[1])
