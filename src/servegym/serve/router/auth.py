"""API keys: which tenant a request is from."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from servegym.documents import load_yaml
from servegym.errors import ConfigError
from servegym.serve.router.config import AuthConfig

_log = logging.getLogger(__name__)

#: Shorter keys could be guessed.
MIN_KEY_CHARACTERS = 16


class Keys:
    """Known keys, as digests.

    Digests are keyed by a number that is drawn at the start, so no one outside can tell which
    digest a key has: how long it takes to look one up says nothing about the keys, and it takes
    as long with one key as with a million.

    Args:
        tenants: Keys by tenant.

    Raises:
        ConfigError: If there is none, one is too short, or one is there twice.
    """

    def __init__(self, tenants: Mapping[str, list[str]]) -> None:
        self._secret = secrets.token_bytes(32)
        self._tenants: dict[bytes, str] = {}
        for tenant, keys in tenants.items():
            for key in keys:
                if len(key) < MIN_KEY_CHARACTERS:
                    raise ConfigError(
                        f"a key of tenant {tenant} has {len(key)} characters: "
                        f"it needs at least {MIN_KEY_CHARACTERS}"
                    )
                digest = self._digest(key)
                owner = self._tenants.get(digest)
                if owner == tenant:
                    raise ConfigError(f"tenant {tenant} has the same key twice")
                if owner is not None:
                    raise ConfigError(f"tenants {owner} and {tenant} have the same key")
                self._tenants[digest] = tenant
        if not self._tenants:
            raise ConfigError("auth is configured, but there is no key: no one could be served")

    @property
    def tenants(self) -> frozenset[str]:
        """Who has a key."""
        return frozenset(self._tenants.values())

    def tenant(self, authorization: str | None) -> str | None:
        """Return the tenant of an `Authorization` header, `None` without a known key."""
        scheme, _, key = (authorization or "").partition(" ")
        found = self._tenants.get(self._digest(key.strip()))
        return found if scheme.lower() == "bearer" else None

    def _digest(self, key: str) -> bytes:
        data = key.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(data, key=self._secret, digest_size=32).digest()


def read_keys(config: AuthConfig) -> Keys:
    """Read the keys from where the configuration says.

    Raises:
        ConfigError: If they cannot be read; a message never holds a key.
    """
    tenants: dict[str, list[str]] = {}
    if config.keys_file is not None:
        for tenant, keys in _from_file(config.keys_file).items():
            tenants.setdefault(tenant, []).extend(keys)
    if config.keys_env is not None:
        for tenant, keys in _from_env(config.keys_env).items():
            tenants.setdefault(tenant, []).extend(keys)
    return Keys(tenants)


def upstream_key(name: str | None) -> str | None:
    """Return the API key that the replicas want.

    Args:
        name: Of the environment variable that holds it; `None`: they want none.

    Raises:
        ConfigError: If it is not set.
    """
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise ConfigError(f"the environment variable {name} with the replicas' key is not set")
    return key


async def watch_file(path: Path, changed: Callable[[], None], interval_s: float = 2.0) -> None:
    """Look at a file for ever, and say when it has changed.

    Args:
        path: It may be replaced, be a link that is turned, or be away for a while.
        changed: Called in a thread of its own, as it may take long.
        interval_s: Between two looks.
    """
    seen = _stamp(path)
    while True:
        await asyncio.sleep(interval_s)
        now = _stamp(path)
        if now != seen:
            seen = now
            await asyncio.to_thread(changed)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _others_may_read(found: os.stat_result) -> bool:
    """Whether more than this process may read a file.

    A secret that Kubernetes mounts is root's, and for the group of the process alone.
    """
    mounted = found.st_uid != os.getuid() and found.st_gid == os.getgid()
    return bool(found.st_mode & (0o007 if mounted else 0o077))


def _from_file(path: Path) -> dict[str, list[str]]:
    try:
        if _others_may_read(path.stat()):
            _log.warning("%s can be read by others: chmod 600 it", path)
        data = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise ConfigError(
            f"{path} is no readable YAML file of keys in which each tenant stands once"
        ) from None
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} must hold a key or a list of keys for each tenant")
    keys = {
        str(tenant): [given] if isinstance(given, str) else given for tenant, given in data.items()
    }
    for tenant, given in keys.items():
        if not isinstance(given, list) or not all(isinstance(key, str) for key in given):
            raise ConfigError(f"{path}: the keys of tenant {tenant} must be texts")
    return keys


def _from_env(name: str) -> dict[str, list[str]]:
    text = os.environ.get(name)
    if text is None:
        raise ConfigError(f"the environment variable {name} with the API keys is not set")
    keys: dict[str, list[str]] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        tenant, equals, key = pair.partition("=")
        if not equals or not tenant:
            raise ConfigError(f"{name} must hold tenant=key pairs separated by commas")
        keys.setdefault(tenant, []).append(key)
    return keys
