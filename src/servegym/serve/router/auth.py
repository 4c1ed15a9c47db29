"""API keys: which tenant a request is from."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from servegym.errors import ConfigError
from servegym.serve.router.config import AuthConfig

_log = logging.getLogger(__name__)

#: Shorter keys could be guessed.
MIN_KEY_CHARACTERS = 16


class Keys:
    """Known keys, as digests.

    Args:
        tenants: Keys by tenant.

    Raises:
        ConfigError: If there is none, one is too short, or two tenants share one.
    """

    def __init__(self, tenants: Mapping[str, list[str]]) -> None:
        self._digests: list[tuple[bytes, str]] = []
        for tenant, keys in tenants.items():
            for key in keys:
                if len(key) < MIN_KEY_CHARACTERS:
                    raise ConfigError(
                        f"a key of tenant {tenant} has {len(key)} characters: "
                        f"it needs at least {MIN_KEY_CHARACTERS}"
                    )
                digest = _digest(key)
                owner = next((name for known, name in self._digests if known == digest), None)
                if owner is not None and owner != tenant:
                    raise ConfigError(f"tenants {owner} and {tenant} have the same key")
                self._digests.append((digest, tenant))
        if not self._digests:
            raise ConfigError("auth is configured, but there is no key: no one could be served")

    def tenant(self, authorization: str | None) -> str | None:
        """Return the tenant of an `Authorization` header, `None` without a known key.

        All keys are compared, each in constant time: how long it takes says nothing about them.
        """
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        found: str | None = None
        for digest, tenant in self._digests:
            if hmac.compare_digest(digest, given):
                found = tenant
        return found if scheme.lower() == "bearer" else None


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


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _from_file(path: Path) -> dict[str, list[str]]:
    try:
        if path.stat().st_mode & 0o077:
            _log.warning("%s can be read by others: chmod 600 it", path)
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise ConfigError(f"{path} is no readable YAML file of keys") from None
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
