"""OpenTelemetry is an extra: it is imported only where a router's file asks for traces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servegym.errors import ConfigError
from servegym.serve.router.config import RouterConfig

if TYPE_CHECKING:
    from servegym.serve.router.tracing import Tracing


def tracing_of(config: RouterConfig) -> type[Tracing] | None:
    """Return what makes spans; `None` if there are to be none.

    Raises:
        ConfigError: If a package is missing.
    """
    if config.tracing is None:
        return None
    try:
        from servegym.serve.router.tracing import Tracing
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tracing needs {error.name}: pip install opentelemetry-sdk "
            "opentelemetry-exporter-otlp-proto-http, or leave tracing out"
        ) from error
    return Tracing
