"""What settings of all learners may be, each said in one sentence."""

from __future__ import annotations

from servegym.errors import ConfigError


def check_load(load: tuple[float, float]) -> None:
    """Refuse a range of load factors that is none.

    Raises:
        ConfigError: If it does not ascend, or begins at 0 or below.
    """
    if not 0 < load[0] <= load[1]:
        raise ConfigError(f"load must be two ascending numbers above 0, got {load}")


def check_minutes(minutes: float) -> None:
    """Refuse a time in which nothing can be learned.

    Raises:
        ConfigError: If it is not above 0.
    """
    if not minutes > 0:
        raise ConfigError(f"minutes must be above 0, got {minutes:g}")


def check_counts(settings: object, *names: str) -> None:
    """Refuse counts below 1.

    Args:
        settings: Has them.
        names: Of them.

    Raises:
        ConfigError: If one is.
    """
    for name in names:
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(settings, name)}")
