"""A collection of objects of the Kubernetes API, followed by list and watch.

The API's own way: a list says how things are and at which version; a watch from that version on
says what changes, and bookmarks bring the version forward where nothing does. A version that the
server no longer knows (410) means to list anew. (kubernetes.io, API concepts, "Efficient detection
of changes".)
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from servegym.errors import ServeGymError
from servegym.serve.discovery.config import KubernetesConfig

_log = logging.getLogger(__name__)

Object = Mapping[str, Any]
#: Objects in one page of a list.
_PAGE = 500
#: The server ends a watch after so long; what the collection rests on is looked at again then.
_WATCH_S = 300
#: Without a word, not even a bookmark, beyond that end the connection is dead.
_SILENT_S = _WATCH_S + 30.0
_LIST_S = 30.0
#: After a failure, doubled each time, seconds.
_FIRST_PAUSE_S, _LAST_PAUSE_S = 1.0, 30.0
#: The largest object that is read, bytes.
MAX_OBJECT_BYTES = 2**22


class ApiError(ServeGymError):
    """Raised when the API server refuses what it is asked."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """Asks the API server, as a service account.

    Args:
        config: Where it is, and who asks.
        session: To ask with; its buffers must hold `MAX_OBJECT_BYTES`.
    """

    def __init__(self, config: KubernetesConfig, session: aiohttp.ClientSession) -> None:
        self._config = config
        self._session = session
        self._tls: ssl.SSLContext | None = None

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        """Return a document.

        Raises:
            ApiError: If the server refuses it.
        """
        timeout = aiohttp.ClientTimeout(total=_LIST_S)
        async with await self.open(path, query or {}, timeout) as response:
            return json.loads(await response.read())

    async def open(
        self, path: str, query: Mapping[str, str], timeout: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        """Ask, and return the answer, to be read and closed.

        Raises:
            ApiError: If the server refuses it.
        """
        response = await self._session.get(
            self._config.server.rstrip("/") + path,
            params=query,
            headers=await asyncio.to_thread(self._who),
            timeout=timeout,
            ssl=await asyncio.to_thread(self._trust),
        )
        if response.status == 200:
            return response
        async with response:
            said = (await response.content.read(2048)).decode("utf-8", "replace")
        raise ApiError(response.status, f"{path} answers {response.status}: {_reason(said)}")

    def _who(self) -> dict[str, str]:
        token = _read(self._config.token_file)
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _trust(self) -> ssl.SSLContext | bool:
        if not self._config.server.startswith("https:"):
            return True
        if self._tls is None:
            self._tls = ssl.create_default_context(cafile=self._config.ca_file)
        return self._tls

    async def namespace(self) -> str:
        """Return the namespace that is meant.

        Raises:
            ApiError: If none is given, and the router is in no pod.
        """
        if self._config.namespace is not None:
            return self._config.namespace
        own = await asyncio.to_thread(_read, self._config.namespace_file)
        if not own:
            raise ApiError(0, f"{self._config.namespace_file} cannot be read: give the namespace")
        return own


class Collection:
    """Follows the objects at one path.

    Args:
        api: To ask.
        path: Of the collection.
        labels: Selector of the objects, as the API writes it.
    """

    def __init__(self, api: Api, path: str, labels: str) -> None:
        self._api = api
        self._path = path
        self._query = {"labelSelector": labels}
        self._objects: dict[str, Object] = {}
        self._version = ""

    async def once(self) -> AsyncGenerator[list[Object]]:
        """Yield all objects now, and whenever one has changed, until the server ends the watch.

        Called again, it goes on where it was.

        Raises:
            ApiError: If the server refuses it, or knows the version no longer: then the next call
                lists anew.
        """
        if not self._version:
            await self._list()
            yield list(self._objects.values())
        query = {
            **self._query,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(_WATCH_S),
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_LIST_S, sock_read=_SILENT_S)
        try:
            async with await self._api.open(self._path, query, timeout) as response:
                while line := await response.content.readline():
                    if self._take(json.loads(line)):
                        yield list(self._objects.values())
        except ApiError:
            self._version = ""
            raise

    async def _list(self) -> None:
        objects: dict[str, Object] = {}
        page, query = {}, {**self._query, "limit": str(_PAGE)}
        while True:
            page = await self._api.get(self._path, query)
            objects |= {_name(item): item for item in page.get("items") or ()}
            if not (rest := page["metadata"].get("continue")):
                break
            query["continue"] = rest
        self._objects, self._version = objects, str(page["metadata"]["resourceVersion"])

    def _take(self, event: Mapping[str, Any]) -> bool:
        """Take in what a watch says; return whether an object has changed."""
        kind, item = event["type"], event["object"]
        if kind == "ERROR":
            code = int(item.get("code", 500))
            raise ApiError(code, f"{self._path}: {item.get('message', 'the watch has failed')}")
        self._version = str(item["metadata"]["resourceVersion"])
        if kind == "DELETED":
            self._objects.pop(_name(item), None)
        elif kind in ("ADDED", "MODIFIED"):
            self._objects[_name(item)] = item
        else:  # BOOKMARK
            return False
        return True


class Patience:
    """How long to wait after a failure, and whether it is worth a word."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._pause_s = _FIRST_PAUSE_S
        self._said = ""

    def good(self) -> None:
        """It has worked."""
        self._pause_s, self._said = _FIRST_PAUSE_S, ""

    async def failed(self, error: Exception) -> None:
        """It has not: say so, once, and wait."""
        text = str(error) or type(error).__name__
        if text != self._said:
            self._said = text
            _log.error("%s: %s; its replicas stay", self._title, text)
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2.0 * self._pause_s, _LAST_PAUSE_S)


def _name(item: Object) -> str:
    return str(item["metadata"]["name"])


def _read(path: Path) -> str:
    """Return what a file of the service account holds, empty if it is not there."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _reason(said: str) -> str:
    """Return the message of a `Status`, else what was said, in one line."""
    try:
        return str(json.loads(said)["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(said.split())[:200]
