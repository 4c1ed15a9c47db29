"""Which headers pass through, in both directions."""

from __future__ import annotations

from collections.abc import Iterable

#: What replicas see of a client unless the configuration says otherwise: W3C trace context and
#: baggage, and what sessions are told by.
DEFAULT_FORWARDED = (
    "accept",
    "accept-language",
    "anthropic-beta",
    "anthropic-version",
    "baggage",
    "traceparent",
    "tracestate",
    "user-agent",
    "x-correlation-id",
    "x-session-*",
    "x-user-id",
)
#: Of W3C's trace context: a router that makes spans has its own in place of the client's.
CONTEXT_HEADERS = frozenset({"traceparent", "tracestate"})
#: Headers that are about one connection, or whose value the router sets itself.
_CONNECTION = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
#: Names the replica that prefills to llm-d's sidecar, as `host:port`.
PREFILLER_HEADER = "x-prefiller-host-port"
#: Never forwarded to a replica: those, what describes the body as the client sent it (the router
#: has unpacked it), what would pack the answer (the router reads along), and the client's key.
_NEVER_FORWARDED = _CONNECTION | {
    "accept-encoding",
    "authorization",
    "content-encoding",
    "content-length",
    "expect",
    "host",
    "x-api-key",
    "x-request-id",
    PREFILLER_HEADER,
}
#: Never passed back to a client.
_NEVER_RETURNED = _CONNECTION | {"content-length", "date", "server", "x-request-id"}


def check_rules(rules: Iterable[str]) -> None:
    """Check the rules of `HeaderFilter`.

    Raises:
        ValueError: If a rule is no name, or names what is never forwarded.
    """
    for rule in rules:
        name = rule.removesuffix("*")
        if not name and rule != "*":
            raise ValueError("a header's name must not be empty")
        if not all(c.isascii() and (c.isalnum() or c in "-_.") for c in name):
            raise ValueError(f"{rule!r} is no name of a header, nor one that ends in *")
        if rule.lower() == "authorization":
            raise ValueError(
                "authorization is never forwarded: upstream_key_env names the replicas' key"
            )
        if rule.lower() in _NEVER_FORWARDED:
            raise ValueError(f"{rule.lower()} is never forwarded: the router sets it itself")


class HeaderFilter:
    """Chooses the headers of a client that replicas see; `Content-Type` always is one of them.

    Args:
        rules: Names, or beginnings of names followed by `*`; case does not matter.
    """

    def __init__(self, rules: Iterable[str]) -> None:
        lower = ["content-type", *(rule.lower() for rule in rules)]
        self._names = frozenset(rule for rule in lower if not rule.endswith("*"))
        self._prefixes = tuple(rule[:-1] for rule in lower if rule.endswith("*"))

    def forwarded(self, given: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return the headers of a client that replicas see, one that is repeated repeatedly."""
        return [(name, value) for name, value in given if self._passes(name.lower())]

    def _passes(self, name: str) -> bool:
        if name in _NEVER_FORWARDED:
            return False
        return name in self._names or (bool(self._prefixes) and name.startswith(self._prefixes))


def returned(given: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the headers of a replica's answer that the client sees."""
    return [(name, value) for name, value in given if name.lower() not in _NEVER_RETURNED]


def retry_after_s(given: Iterable[tuple[str, str]]) -> float | None:
    """Read `Retry-After` in seconds; `None` where there is none, or a date."""
    text = next((value for name, value in given if name.lower() == "retry-after"), "").strip()
    return float(text) if text.isascii() and text.isdecimal() and len(text) < 7 else None
