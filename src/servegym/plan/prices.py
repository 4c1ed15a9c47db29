"""What GPUs cost an hour, and where that was read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field

from servegym.assets.specs import gpu
from servegym.documents import checked, read_mapping
from servegym.errors import ConfigError
from servegym.scenario.config import Config


class Price(Config):
    """Rent of one GPU.

    Attributes:
        usd_per_h: Dollars an hour.
        source: Where it was read, and when.
    """

    usd_per_h: float = Field(gt=0)
    source: str = Field(min_length=1)


class PriceTable(Config):
    """A file of prices: a line `GPU: {usd_per_h: 2.49, source: "..."}` for each."""

    prices: Mapping[str, Price]


def read_prices(gpus: Iterable[str], path: Path | None) -> dict[str, Price]:
    """Return the price of each GPU.

    Args:
        gpus: Names in `assets/gpus.yaml`.
        path: YAML file of prices; None: those of `assets/gpus.yaml`.

    Raises:
        ConfigError: If there is no such file, it has no price of one of them, or it is no table.
    """
    if path is None:
        known = {name: gpu(name) for name in gpus}
        return {
            name: Price(usd_per_h=spec.price_usd_per_h, source=spec.price_source)
            for name, spec in known.items()
        }
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"no readable file of prices at {path}") from None
    form = "GPU: {usd_per_h: 2.49, source: where and when}"
    found = checked({"prices": read_mapping(text, str(path), form)}, str(path), PriceTable).prices
    missing = [name for name in gpus if name not in found]
    if missing:
        raise ConfigError(
            f"{path} has no price of {missing[0]}: add a line {missing[0]}: "
            "{usd_per_h: ..., source: ...}"
        )
    return {name: found[name] for name in gpus}
