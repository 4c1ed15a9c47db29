"""Which versions of vLLM the plug-in knows."""

from __future__ import annotations

from servegym.errors import ConfigError

#: Starts of the versions whose scheduler this was tried on.
KNOWN_VERSIONS = ("0.32.",)


def require_known(version: str) -> None:
    """Refuse a version that was not tried: its scheduler may take decisions another way.

    Raises:
        ConfigError: If it is not among `KNOWN_VERSIONS`.
    """
    if not version.startswith(KNOWN_VERSIONS):
        known = ", ".join(f"{start}x" for start in KNOWN_VERSIONS)
        raise ConfigError(
            f"servegym's scheduler knows vLLM {known}, this is {version}: "
            "install one of those, or start without --scheduler-cls"
        )
